import re

import torch

from cbam_pl import environment
from cbam_pl.environment import UNKNOWN, commit, describe_environment, environments_by_key


def test_it_names_what_was_measured_with(monkeypatch, tmp_path):
    found = describe_environment(torch.device("cpu"))
    assert f"torch {torch.__version__.split('+')[0]}" in found["versions"]
    assert re.fullmatch(r"cpu: \S.*", found["device"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert re.fullmatch(r"unknown|\S*[0-9a-f]{7,}(-dirty)?", found["commit"])
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "cbam_pl/environment.py"))
    assert commit() == "unknown"


def test_several_environments_are_one_text_for_each_key():
    first = dict.fromkeys(UNKNOWN, "a")
    texts = environments_by_key([first, {**first, "commit": "b"}, first])
    assert texts == {**first, "commit": "a, then b"}
    assert environments_by_key([]) == UNKNOWN
