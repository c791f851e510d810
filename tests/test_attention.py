"""Every form of attention against its definition, written the slow plain way, or against an independent library.

The largest differences in docs/attention.md:

    python -m pytest tests/test_attention.py tests/test_attention_variants.py -rP | grep "largest difference"
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

from cbam_pl.attention import (
    BAM,
    CBAM,
    AttentionConfig,
    ChannelAttention,
    EfficientChannelAttention,
    SpatialAttention,
    SqueezeExcitation,
)
from tests.attention_oracles import (
    DESCRIPTORS,
    KINDS,
    PRESETS,
    assert_near,
    build,
    dear_variants,
    maps,
    slow_cbam,
    slow_channel_logits,
    slow_spatial_logits,
    variants,
)

# Equal to the definitions.


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_its_definition(preset, training):
    cbam = build(AttentionConfig(preset=preset), channels=32).train(training)
    x = maps(2, 32, 5, 4).requires_grad_(training)  # maxima are found in another way where a gradient is wanted
    expected = slow_cbam(x, copy.deepcopy(cbam), DESCRIPTORS[preset])
    assert_near(cbam(x), expected, f"{preset} against the equations")


def test_squeeze_excitation_is_torchvisions():
    ours = build(AttentionConfig("se", mlp_bias=True), 32)
    theirs = torchvision.ops.SqueezeExcitation(32, 2)
    with torch.no_grad():
        for mine, other in [(ours.reduce, theirs.fc1), (ours.expand, theirs.fc2)]:
            other.weight.copy_(mine.weight[:, :, None, None])
            other.bias.copy_(mine.bias)
    x = maps(4, 32, 5, 6)
    assert_near(ours(x), theirs(x), "se against torchvision's SqueezeExcitation")


def test_squeeze_excitation_is_its_equation():
    attention = build(AttentionConfig("se"), 32)
    x = maps(2, 32, 3, 4)
    expected = x * torch.sigmoid(slow_channel_logits(x, attention, ["avg"]))
    assert_near(attention(x), expected, "se against the equations")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_all_forms_of_the_shared_mlp_are_one(bias):
    attention = build(AttentionConfig("channel", mlp_bias=bias, reduction=4), 16)
    reduce, expand = attention.reduce, attention.expand
    x = maps(3, 16, 4, 5)
    average, maximum = x.mean((2, 3)), x.amax((2, 3))

    def mlp(pooled):
        return expand(torch.relu(reduce(pooled)))

    dense = mlp(average) + mlp(maximum)
    stacked = mlp(torch.stack([average, maximum])).sum(0)
    tiled_weight = torch.block_diag(reduce.weight, reduce.weight)  # one wide MLP on both pools side by side
    tiled_bias = [None, None] if not bias else [reduce.bias.tile(2), 2 * expand.bias]
    wide = torch.relu(F.linear(torch.cat([average, maximum], 1), tiled_weight, tiled_bias[0]))
    tiled = F.linear(wide, expand.weight.tile(2), tiled_bias[1])

    def pointwise(pooled):
        hidden = torch.relu(F.conv2d(pooled[:, :, None, None], reduce.weight[:, :, None, None], reduce.bias))
        return F.conv2d(hidden, expand.weight[:, :, None, None], expand.bias)[:, :, 0, 0]

    convolved = pointwise(average) + pointwise(maximum)
    logits = attention.logits(x)[1][:, :, 0, 0]
    for name, form in {"dense": dense, "stacked": stacked, "tiled": tiled, "1×1": convolved}.items():
        assert_near(logits, form, f"channel against the {name} form", tolerance=2e-6)  # logits reach 4


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("descriptor", ["mean_max", "max_mean", "mean", "max"])
def test_spatial_attention_is_its_definition(descriptor, kernel_size):
    attention = build(AttentionConfig("spatial", descriptor=descriptor, kernel_size=kernel_size, conv_bias=True))
    for needs_gradient in (False, True):
        x = maps(2, 6, 5, 4).requires_grad_(needs_gradient)
        expected = x * torch.sigmoid(slow_spatial_logits(x, attention, descriptor.split("_")))
        assert_near(attention(x), expected, f"spatial with {descriptor}")


def test_each_order_is_what_it_says():
    x = maps(2, 8, 5, 4)
    channel = build(AttentionConfig("channel"), seed=2)
    spatial = build(AttentionConfig("spatial"), seed=3)
    expected = {
        "channel_spatial": spatial(channel(x)),
        "spatial_channel": channel(spatial(x)),
        "parallel": x * torch.sigmoid(channel.logits(x)[1] + spatial.logits(x)[1]),
        "channel": channel(x),
        "spatial": spatial(x),
    }
    for order, output in expected.items():
        cbam = CBAM(8, order=order)
        if order != "spatial":
            cbam.channel.load_state_dict(channel.state_dict())
        if order != "channel":
            cbam.spatial.load_state_dict(spatial.state_dict())
        assert_near(cbam(x), output, f"cbam in the order {order}", tolerance=0)
    for one, other in itertools.combinations(expected.values(), 2):
        assert (one - other).abs().max() > 0.01


@variants
def test_forward_is_the_input_times_every_gate(config):
    attention = build(config).eval()
    x = maps(3, 8, 6, 5)
    gates = attention.gates(x)
    product = x
    for name, gate in gates.items():
        assert gate.shape == {"channel": (3, 8, 1, 1), "spatial": (3, 1, 6, 5), "joint": (3, 8, 6, 5)}[name]
        low = 1 if config.kind == "bam" else 0
        assert low < gate.min() <= gate.max() < low + 1
        product = product * gate
    torch.testing.assert_close(attention(x), product, rtol=0, atol=0)


# Options.


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({"channels": 64}, 4),
        ({"channels": 8, "reduction": 16}, 1),
        ({"channels": 8, "reduction": 8, "min_hidden": 0}, 1),
        ({"channels": 64, "min_hidden": 6}, 6),
        ({"channels": 31}, 1),
        ({"channels": 24, "rounding": "nearest"}, 2),
        ({"channels": 23, "rounding": "nearest"}, 1),
    ],
)
def test_hidden_width(options, hidden):
    assert ChannelAttention(**options).reduce.out_features == hidden
    assert SqueezeExcitation(**options).reduce.out_features == hidden


PARAMETERS_AT_64 = {
    "paper": (AttentionConfig(), 64 * 4 * 2 + 98),
    "official": (AttentionConfig(preset="official"), 64 * 4 * 2 + 4 + 64 + 98 + 2),
    "timm": (AttentionConfig(preset="timm"), 64 * 4 * 2 + 98 + 2),
    "keras": (AttentionConfig(preset="keras"), 64 * 8 * 2 + 8 + 64 + 98),
    "channel": (AttentionConfig("channel"), 512),
    "spatial": (AttentionConfig("spatial"), 98),
    "se": (AttentionConfig("se"), 512),
    "eca": (AttentionConfig("eca"), 3),
    # Two linear layers and their norm; 1×1, two 3×3 and 1×1 convolutions and three norms.
    "bam": (AttentionConfig("bam"), 260 + 8 + 320 + 260 + 2 * 148 + 5 + 3 * 8),
    "parallel": (AttentionConfig(order="parallel"), 610),
    "learned": (AttentionConfig(descriptor="learned"), 512 + 64 + 49),
}


@pytest.mark.parametrize(("config", "count"), PARAMETERS_AT_64.values(), ids=PARAMETERS_AT_64)
def test_parameter_count(config, count):
    assert sum(parameter.numel() for parameter in config.build(64).parameters()) == count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelAttention(0), r"^channels=0 must be at least 1$"),
        (lambda: CBAM(0, order="spatial"), r"^channels=0 must be at least 1$"),
        (lambda: BAM(0), r"^channels=0 must be at least 1$"),
        (lambda: EfficientChannelAttention(-1), r"^channels=-1 must be at least 1$"),
        (lambda: SpatialAttention(descriptor="learned", channels=0), r"^channels=0 must be at least 1$"),
        (lambda: SqueezeExcitation(8, reduction=0), r"^reduction=0 must be at least 1$"),
        (lambda: ChannelAttention(8, min_hidden=-1), r"^min_hidden=-1 must be at least 0$"),
        (
            lambda: ChannelAttention(8, reduction=16, min_hidden=0),
            r"^reduction=16 leaves no hidden unit for channels=8 with min_hidden=0; use a reduction of at most 8",
        ),
        (lambda: ChannelAttention(8, rounding="up"), r"^rounding='up' is unknown; use one of down, nearest$"),
        (lambda: ChannelAttention(8, pools=()), r"^pools=\(\) must be a list of one or more of avg, max, lse, lp"),
        (lambda: ChannelAttention(8, pools="avg"), r"^pools='avg' must be a list"),
        (lambda: ChannelAttention(8, pools=("avg", "avg")), r"^pools=\('avg', 'avg'\) must .* each once$"),
        (lambda: CBAM(8, pools=("min",)), r"^pools='min' is unknown; use one of avg, max, lse, lp$"),
        (lambda: SpatialAttention(4), r"^kernel_size=4 must be odd and at least 1"),
        (lambda: CBAM(8, kernel_size=-1), r"^kernel_size=-1 must be odd and at least 1"),
        (lambda: EfficientChannelAttention(8, 2), r"^kernel_size=2 must be odd and at least 1"),
        (lambda: SpatialAttention(descriptor="min"), r"^descriptor='min' is unknown; use one of mean_max, max_mean"),
        (lambda: SpatialAttention(descriptor="learned"), r"^channels=None must be given with descriptor='learned'$"),
        (lambda: SpatialAttention(channels=8), r"^channels=8 has no effect with descriptor='mean_max'; leave it out$"),
        (lambda: SpatialAttention(norm_weight=0.0), r"^norm_weight=0.0 has no effect with norm=False; leave it out$"),
        (lambda: CBAM(8, norm_momentum=0.1), r"^norm_momentum=0.1 has no effect with norm=False; leave it out$"),
        (lambda: CBAM(8, order="both"), r"^order='both' is unknown; use one of channel_spatial, spatial_channel, par"),
        (lambda: CBAM(8, order="channel", kernel_size=3), r"^kernel_size=3 has no effect with order='channel'; leave"),
        (lambda: CBAM(8, preset="torch"), r"^preset='torch' is unknown; use one of paper, official, timm, keras$"),
        (lambda: AttentionConfig("cbma"), r"^kind='cbma' is unknown; use one of none, se, channel, spatial, cbam, e"),
        (lambda: AttentionConfig(preset="torch"), r"^preset='torch' is unknown; use one of paper, official, timm, k"),
        (lambda: AttentionConfig("se", preset="timm"), r"^preset='timm' has no effect with kind='se'; leave it out"),
        (lambda: AttentionConfig("none", stages=(1,)), r"^stages=\(1,\) has no effect with kind='none'; leave it out$"),
        (lambda: AttentionConfig(place="inside"), r"^place='inside' is unknown; use one of before_addition, after_ad"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# A value for every option, and the kinds that have a use for it.
MLP_KINDS = {"se", "channel", "cbam"}
OPTIONS = {
    "order": ("parallel", {"cbam"}),
    "reduction": (4, MLP_KINDS | {"bam"}),
    "pools": (("max",), {"channel", "cbam"}),
    "min_hidden": (6, MLP_KINDS | {"bam"}),
    "rounding": ("nearest", MLP_KINDS),
    "mlp_bias": (True, MLP_KINDS),
    "kernel_size": (5, {"spatial", "cbam", "eca"}),
    "descriptor": ("max", {"spatial", "cbam"}),
    "conv_bias": (True, {"spatial", "cbam"}),
    "norm": (True, {"spatial", "cbam"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_has_its_effect_or_is_rejected(option):
    value, kinds = OPTIONS[option]
    for kind in ["none", *KINDS]:
        if kind not in kinds:
            with pytest.raises(ValueError, match=rf"^{option}=.* has no effect with kind='{kind}'; leave it out"):
                AttentionConfig(kind, **{option: value})
            continue
        made = []
        for options in ({option: value}, {}):
            torch.manual_seed(0)
            made.append(AttentionConfig(kind, **options).build(40))  # 2.5 sixteenths, rounded down or up
        shapes = [{name: p.shape for name, p in attention.named_parameters()} for attention in made]
        x = maps(2, 40, 5, 5)
        assert shapes[0] != shapes[1] or not torch.equal(made[0](x), made[1](x)), kind


def test_config_none_is_the_identity():
    assert isinstance(AttentionConfig("none").build(8), nn.Identity)


# Safe.


@variants
def test_bfloat16_autocast_stays_within_its_rounding(config):
    attention = build(config).eval()
    x = maps(4, 8, 6, 6)
    exact = attention(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = attention(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    # 2⁻⁸ is half a unit in the last place; logits of up to 4, gates and the product are rounded a few times each.
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-6, atol=2**-6)
    if config.kind != "bam":  # whose convolutions gain from half precision
        assert torch.equal(rounded, attention(x.bfloat16().float()).bfloat16())


@variants
def test_each_layer_is_called_so_that_its_hooks_run(config):
    attention = build(config).eval()
    called = set()
    for name, module in attention.named_modules():
        if name and next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda module, arguments, output, name=name: called.add(name))
    attention(maps(2, 8, 6, 6).requires_grad_())
    assert called == {name.rpartition(".")[0] for name, _ in attention.named_parameters()} - {""}


@pytest.mark.parametrize("change", [prune.l1_unstructured, nn.utils.parametrizations.weight_norm])
def test_layers_with_other_weights_train(change):
    cbam = build(AttentionConfig())
    for layer in (cbam.channel.reduce, cbam.channel.expand, cbam.spatial.conv):
        change(layer, "weight", **({"amount": 0.5} if change is prune.l1_unstructured else {}))
    optimizer = torch.optim.SGD(cbam.parameters(), lr=1.0)
    x, before = maps(4, 8, 6, 6), None
    for _ in range(2):
        loss = cbam(x.clone().requires_grad_()).square().sum()
        assert loss != before
        loss.backward()
        optimizer.step()
        before = loss
    with torch.no_grad():
        evaluated = cbam(x)
    torch.testing.assert_close(cbam(x.clone().requires_grad_()), evaluated)
    assert len(list(cbam.parameters())) == (3 if change is prune.l1_unstructured else 6)


@pytest.fixture
def cuda_autocast():
    """Switches autocast on, which the context torch.autocast does not where there is no GPU."""

    def enable(dtype):
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)

    before = torch.get_autocast_dtype("cuda")
    yield enable
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@variants
def test_autocast_on_cuda_keeps_the_type_of_the_map(config, dtype, cuda_autocast):
    cuda_autocast(dtype)
    # A result in float32 would make all that follows it float32, too. Fake tensors know types alone, and need no GPU.
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 32, 8, 8, dtype=dtype, requires_grad=True)
        for attention in (config.build(32), replace(config, start="identity").build(32)):
            assert attention(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@variants
def test_autocast_of_weights_of_another_type(config, dtype):
    attention, x = build(config).eval(), maps(4, 8, 6, 6)
    exact = attention(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = attention.to(dtype)(x.to(dtype))
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-5, atol=2**-5)


@variants
def test_deterministic_mode_runs_and_repeats(config):
    attention = build(config)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            x = maps(4, 8, 6, 6).requires_grad_()
            y = copy.deepcopy(attention)(x)
            y.square().sum().backward()
            results.append((y, x.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def compiled_agrees(config, backend):
    """Forward and backward over three batch sizes; returns the number of graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    attention = build(config)
    twin = copy.deepcopy(attention)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    for batch in (4, 6, 9):
        x = maps(batch, 8, 6, 5).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        z = x.detach().clone().requires_grad_()
        y, expected = compiled(x), twin(z)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    return counter.frame_count


@dear_variants
def test_compiles_to_one_graph_for_all_batch_sizes(config):
    assert compiled_agrees(config, "aot_eager") == 1


@pytest.mark.slow
def test_compiled_code_gives_the_same_numbers():
    assert compiled_agrees(AttentionConfig(preset="official"), "inductor") == 1


@variants
def test_exports_with_any_batch_and_map(config):
    attention = build(config).eval()
    dim = torch.export.Dim
    shapes = ({0: dim("batch", min=2, max=64), 2: dim("height", min=2, max=64), 3: dim("width", min=2, max=64)},)
    exported = torch.export.export(attention, (maps(3, 8, 6, 5),), dynamic_shapes=shapes).module()
    for shape in [(3, 8, 6, 5), (5, 8, 9, 4)]:
        x = maps(*shape)
        torch.testing.assert_close(exported(x), attention(x), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:copyreg", "ignore::DeprecationWarning:onnxscript")
@dear_variants
def test_onnx_agrees(config, tmp_path):
    pytest.importorskip("onnxscript", reason="the optional extra onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the optional extra onnx")
    attention = build(config).eval()
    path = tmp_path / "attention.onnx"
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.onnx.export(attention, (maps(3, 8, 6, 5),), path, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for size in (3, 5):
        x = maps(size, 8, 6, 5)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), attention(x).detach(), rtol=0, atol=1e-5)


@variants
def test_memory_format_is_kept(config):
    attention = build(config).eval()
    x = maps(3, 8, 6, 5).requires_grad_()
    expected = attention(x)
    assert expected.is_contiguous()
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for module in (attention, attention.to(memory_format=torch.channels_last)):
        z = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        y = module(z)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), z)[0], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 5, 5), (3, 8, 1, 1), (1, 8, 1, 1), (2, 8, 2, 3), (2, 8, 1, 6)], ids=str)
@variants
def test_small_input_agrees_with_the_same_inside_a_larger_batch(config, shape):
    """Batch of one, 1×1 maps, kernels larger than the map: each image alone, against it among others."""
    attention = build(config).eval()
    x = maps(*shape)
    y = attention(x)
    assert y.shape == shape
    crowd = attention(torch.cat([maps(4, *shape[1:], seed=5), x]))[4:]
    torch.testing.assert_close(y, crowd, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (1, 32, 2, 3)], ids=str)
def test_small_input_is_the_definition(preset, shape):
    cbam = build(AttentionConfig(preset=preset), 32).eval()
    x = maps(*shape)
    assert_near(cbam(x), slow_cbam(x, cbam, DESCRIPTORS[preset]), f"{preset} on a small map")


@variants
def test_empty_batch(config):
    attention = build(config)
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    for mode in (True, False):
        y = attention.train(mode)(x)
        assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 8, 4, 4)
    for parameter in attention.parameters():
        assert not parameter.grad.any()


def test_copies_do_not_share_state():
    cbam = build(AttentionConfig(preset="official"))
    twin = copy.deepcopy(cbam)
    before = copy.deepcopy(twin.state_dict())
    cbam(maps(4, 8, 6, 6))
    assert not torch.equal(cbam.spatial.norm.running_mean, before["spatial.norm.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_unknown_option_of_cbam_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'kernel'"):
        CBAM(8, kernel=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.attention.kind", "cbma"], "kind"),
        (["--model.attention.preset", "torch"], "preset"),
        (["--model.attention.order", "both"], "order"),
        (["--model.attention.pools", "[avg, min]"], "pools"),
        (["--model.attention.kernel_size", "4"], "kernel_size=4 must be odd and at least 1"),
        (["--model.attention.reduction", "64", "--model.attention.min_hidden", "0"], "reduction=64 leaves no hidden"),
        (["--model.attention.kind", "se", "--model.attention.kernel_size", "5"], "kernel_size=5 has no effect"),
        (["--model.attention.stages", "[3, 4]"], "stages=(3, 4) has no effect in the cnn"),
    ],
)
def test_bad_option_on_the_command_line_is_status_2(command, recipe, options, message):
    outcome = command("fit", "--config", recipe, *options)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err
