"""Networks on the Hugging Face Hub, through huggingface_hub's mixin: pip install huggingface_hub."""

from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any, cast

import torch
from huggingface_hub import ModelHubMixin, snapshot_download

from cbam_pl.errors import UserError
from cbam_pl.training.checkpoint import load_classifier, read_checkpoint
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.weights_folder import NAMES


class HubClassifier(ModelHubMixin, Classifier):  # type: ignore[misc]  # Classifier.from_pretrained leads here
    """A Classifier that was read from a folder of weights or from the Hub; Classifier.from_pretrained makes it.

    `save_pretrained` and `push_to_hub` give the folder as it was read, with its card, whose figures are of its weights.
    """

    folder: Path | None = None  # that it was read from

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, force_download: bool = False, trust: Sequence[str] = (), **options: Any
    ) -> "HubClassifier":
        folder = Path(model_id)
        if not folder.is_dir():
            # Of a repository only what such a folder has.
            names = [*NAMES]
            folder = Path(snapshot_download(model_id, allow_patterns=names, force_download=force_download, **options))
        content = read_checkpoint(folder)
        classifier = cast(HubClassifier, load_classifier(folder, content, trust=trust, make=cls))
        classifier.folder = folder
        return classifier.eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the folder that it was read from to another, as ModelHubMixin does, with its options.

        Raises:
            UserError: there is no such folder, it is `save_directory` itself, or the weights have changed since.
        """
        # Checked here, since the mixin deletes save_directory's config.json before it calls _save_pretrained.
        if self.folder is None:
            raise UserError("this classifier was not read from a folder of weights; export its checkpoint first")
        if Path(save_directory).resolve() == self.folder.resolve():
            raise UserError(f"{save_directory} is the folder that this classifier was read from; name another")
        saved = read_checkpoint(self.folder)["state_dict"]
        if any(not torch.equal(saved[name], value.cpu()) for name, value in self.state_dict().items()):
            raise UserError(f"the weights are no longer those of {self.folder}; export their checkpoint instead")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = cast(Path, self.folder)  # save_pretrained has looked
        for name in NAMES:
            if (folder / name).exists():
                copyfile(folder / name, save_directory / name)
