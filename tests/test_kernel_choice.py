"""Which kernel runs: the one asked for by name or an error that says why not; only `auto` chooses."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.machines import AMPERE, BLACKWELL, HOPPER, LIBRARIES, TURING, pretend_gpu
from tests.tolerance import cumulative, packed
from varlen_vision.errors import KernelError
from varlen_vision.histogram import Histogram
from varlen_vision.kernels import KERNELS, available_kernels, choose, flash_attn_varlen_func
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.kernels.spec import Request
from varlen_vision.kernels.table import forget_choices

NAMES = [
    "window_triton",
    "flash_attn_4",
    "flash_attn_3",
    "flash_attn_2",
    "torch_varlen",
    "sdpa_segments",
    "sdpa_mask",
    "reference",
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

Pretend = Callable[[tuple[int, int], set[str]], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Makes this machine look like one with a GPU of that capability and those libraries installed."""

    def machine(capability: tuple[int, int], installed: set[str]) -> None:
        forget_choices()
        pretend_gpu(monkeypatch, capability, installed)

    yield machine
    forget_choices()  # what was chosen for the pretended machine must not outlive it


def request(
    device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16, mean_seqlen: int = 64, **facts: object
) -> Request:
    return Request(
        device=device,
        dtype=dtype,
        lengths=Histogram.of((mean_seqlen,)),
        **({"head_dim": 80} | facts),  # type: ignore[arg-type]
    )


def test_the_table_is_complete() -> None:
    assert list(KERNELS) == NAMES
    for name, kernel in KERNELS.items():
        module = importlib.import_module(kernel.module)
        assert kernel.name == name and callable(module.run) and callable(module.load)
        for option, values in kernel.options:
            default = inspect.signature(module.run).parameters[option].default
            assert values[0] == default


@pytest.mark.parametrize("device", [None, "cpu"])
def test_every_no_has_a_reason_and_no_yes_has_one(device: str | None) -> None:
    rows = available_kernels(device)
    assert [row.name for row in rows] == NAMES
    for row in rows:
        assert row.usable == (row.reason == "") and row.calls
    usable = {row.name for row in rows if row.usable}
    assert {"sdpa_segments", "sdpa_mask", "reference"} <= usable
    if device == "cpu":
        assert usable == {"sdpa_segments", "sdpa_mask", "reference"}
        assert all("cpu" in row.reason and "CUDA" in row.reason for row in rows if not row.usable)


def test_kernels_of_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking about CUDA on a machine without it is a question, not a mistake."""

    def no_gpu(device: object = None) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", no_gpu)
    rows = available_kernels("cuda")
    assert [row.name for row in rows] == NAMES
    assert not any(row.usable for row in rows) and all(row.reason for row in rows)


def test_kernels_of_a_gpu_with_everything_installed(pretend: Pretend) -> None:
    pretend(HOPPER, LIBRARIES)
    assert all(row.usable and not row.reason for row in available_kernels("cuda"))
    pretend(TURING, {"flash_attn_2"})
    reasons = {row.name: row.reason for row in available_kernels("cuda")}
    assert "7.5" in reasons["flash_attn_2"] and "8.0" in reasons["flash_attn_2"]
    assert "not importable" in reasons["flash_attn_4"] and "7.5" in reasons["flash_attn_4"]
    assert reasons["sdpa_segments"] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mean_seqlen", [1, 64, 6144])
def test_auto_on_the_cpu(dtype: torch.dtype, mean_seqlen: int) -> None:
    choice = choose(request(CPU, dtype, mean_seqlen))
    assert choice.kernel.name == "sdpa_segments"
    assert [name for name, _ in choice.passed_over] == NAMES[:5]
    assert all(reasons and all(reasons) for _, reasons in choice.passed_over)


# Machine, libraries, mean length, what else is asked; then the kernel that `auto` must choose.
AUTO = [
    (HOPPER, LIBRARIES, 6144, {}, "flash_attn_4"),
    (HOPPER, {"flash_attn_4"}, 1024, {}, "flash_attn_4"),
    (HOPPER, {"flash_attn_4"}, 1023, {}, "torch_varlen"),
    (HOPPER, {"flash_attn_4"}, 64, {}, "torch_varlen"),
    (HOPPER, LIBRARIES, 64, {}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 64}, "window_triton"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 128, "grouped_heads": True}, "window_triton"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 129}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 64, "needs_grad": True}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 64, "causal": True}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 64, "dropout": True}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 64, "same_lengths": False}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 64, "head_dim": 88}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 64, {"max_seqlen": 64, "segments": 65536}, "window_triton"),
    (AMPERE, set(), 64, {"max_seqlen": 64, "dtype": torch.float16}, "window_triton"),
    (TURING, set(), 64, {"max_seqlen": 64}, "sdpa_segments"),
    (HOPPER, {"flash_attn_4"}, 64, {"segments": 65535}, "torch_varlen"),
    (HOPPER, {"flash_attn_4"}, 64, {"segments": 65536}, "sdpa_segments"),
    (HOPPER, {"flash_attn_3"}, 6144, {}, "flash_attn_3"),
    (HOPPER, LIBRARIES, 6144, {"head_dim": 160}, "flash_attn_3"),
    (HOPPER, LIBRARIES, 6144, {"dropout": True}, "flash_attn_2"),
    (HOPPER, LIBRARIES, 6144, {"needs_grad": True, "head_dim": 128}, "flash_attn_4"),
    (HOPPER, LIBRARIES, 6144, {"needs_grad": True}, "flash_attn_3"),
    (BLACKWELL, LIBRARIES, 6144, {}, "flash_attn_4"),
    (BLACKWELL, {"flash_attn_3"}, 6144, {}, "torch_varlen"),
    (AMPERE, LIBRARIES, 6144, {}, "flash_attn_2"),
    (AMPERE, LIBRARIES, 64, {}, "flash_attn_2"),
    (AMPERE, set(), 64, {}, "torch_varlen"),
    (AMPERE, LIBRARIES, 6144, {"dtype": torch.float32}, "sdpa_segments"),
    (AMPERE, LIBRARIES, 6144, {"head_dim": 81}, "sdpa_segments"),
    (AMPERE, LIBRARIES, 6144, {"head_dim": 264}, "sdpa_segments"),
    (TURING, LIBRARIES, 6144, {}, "sdpa_segments"),
]


@pytest.mark.parametrize("capability, installed, mean_seqlen, facts, expected", AUTO)
def test_auto_on_a_gpu(
    capability: tuple[int, int],
    installed: set[str],
    mean_seqlen: int,
    facts: dict[str, object],
    expected: str,
    pretend: Pretend,
) -> None:
    pretend(capability, installed)
    choice = choose(request(mean_seqlen=mean_seqlen, **facts))
    assert choice.kernel.name == expected
    assert [name for name, _ in choice.passed_over] == NAMES[: NAMES.index(expected)]
    assert all(reasons and all(reasons) for _, reasons in choice.passed_over)


def test_auto_never_takes_the_baseline_or_the_oracle() -> None:
    """Keys cut differently: sdpa_mask and reference could, but only a name gets them."""
    cross = request(CPU, same_lengths=False)
    assert choose(cross, "sdpa_mask").kernel.name == "sdpa_mask"
    assert choose(cross, "reference").kernel.name == "reference"
    with pytest.raises(KernelError) as caught:
        choose(cross)
    for name in NAMES:
        assert f"{name}: " in str(caught.value)
    assert str(caught.value).count("only when asked for by name") == 2


def test_an_unknown_kernel_lists_the_known_ones() -> None:
    with pytest.raises(KernelError) as caught:
        choose(request(CPU), "flash")
    for word in ("'flash'", "auto", *NAMES):
        assert word in str(caught.value)


# Machine, libraries, the kernel asked for, what is asked of it, and what the error must name.
REFUSED = [
    (AMPERE, LIBRARIES, "flash_attn_2", {"device": CPU}, ["device is cpu"], ["sdpa_segments", "sdpa_mask"]),
    (
        AMPERE,
        LIBRARIES,
        "flash_attn_2",
        {"dtype": torch.float32},
        ["float32", "bfloat16, float16"],
        ["sdpa_segments"],
    ),
    (AMPERE, LIBRARIES, "flash_attn_4", {}, ["8.0", "9.0 to 11.9"], ["flash_attn_2", "torch_varlen"]),
    (BLACKWELL, LIBRARIES, "flash_attn_3", {}, ["10.0", "9.0 to 9.0"], ["flash_attn_4", "torch_varlen"]),
    (
        HOPPER,
        LIBRARIES,
        "flash_attn_4",
        {"needs_grad": True},
        ["gradients", "80", "64, 96, 128"],
        ["flash_attn_3"],
    ),
    (HOPPER, LIBRARIES, "flash_attn_4", {"head_dim": 136}, ["136", "at most 128"], ["flash_attn_3"]),
    (HOPPER, LIBRARIES, "flash_attn_2", {"head_dim": 84}, ["84", "multiples of 8"], ["sdpa_segments"]),
    (HOPPER, LIBRARIES, "torch_varlen", {"segments": 70000}, ["70000", "at most 65535"], ["sdpa_segments"]),
    (HOPPER, LIBRARIES, "torch_varlen", {"dropout": True}, ["dropout_p > 0"], ["flash_attn_2"]),
    (HOPPER, LIBRARIES, "sdpa_mask", {"causal": True}, ["causal"], ["flash_attn_2", "sdpa_segments"]),
    (HOPPER, LIBRARIES, "sdpa_segments", {"same_lengths": False}, ["cut differently"], ["flash_attn_2"]),
    (HOPPER, LIBRARIES, "window_triton", {"max_seqlen": 129}, ["129", "at most 128"], ["flash_attn_2"]),
    (HOPPER, LIBRARIES, "window_triton", {"needs_grad": True}, ["no backward"], ["flash_attn_2"]),
    (HOPPER, LIBRARIES, "window_triton", {"head_dim": 88}, ["88", "64, 72, 80, 96, 128"], ["flash_attn_2"]),
    (
        TURING,
        set(),
        "flash_attn_2",
        {"dtype": torch.float32, "head_dim": 300, "device": CUDA},
        ["7.5", "not importable", "float32", "multiples of 8", "at most 256"],
        ["sdpa_segments"],
    ),
]


@pytest.mark.parametrize("capability, installed, name, facts, reasons, able", REFUSED)
def test_a_named_kernel_runs_or_says_every_reason(
    capability: tuple[int, int],
    installed: set[str],
    name: str,
    facts: dict[str, object],
    reasons: list[str],
    able: list[str],
    pretend: Pretend,
) -> None:
    pretend(capability, installed)
    with pytest.raises(KernelError) as caught:
        choose(request(**facts), name)
    why, _, others = str(caught.value).partition("These can: ")
    for words in (repr(name), *reasons):
        assert words in why
    for words in able:
        assert words in others
    assert name not in others


def test_where_nothing_can_run_the_error_says_so() -> None:
    integers = request(CPU, torch.int32)
    with pytest.raises(KernelError, match="No other kernel can"):
        choose(integers, "sdpa_segments")
    with pytest.raises(KernelError, match="no kernel can take"):
        choose(integers)


def test_a_named_kernel_is_taken_where_auto_would_not(pretend: Pretend) -> None:
    """`auto` finds flash_attn_4 too slow for windows of 64; a name is still obeyed."""
    pretend(HOPPER, LIBRARIES)
    for name in NAMES:
        choice = choose(request(mean_seqlen=64), name)
        assert choice.kernel.name == name and not choice.passed_over


# Kernel, options, and what the error must name.
BAD_OPTIONS = [
    ("sdpa_mask", {"mask_build": "by_hand"}, ["'by_hand'", *MASK_BUILDS]),
    ("sdpa_mask", {"mask": "host"}, ["mask='host'", "takes mask_build"]),
    ("sdpa_segments", {"mask_build": "host"}, ["'sdpa_segments'", "mask_build='host'", "no options"]),
    ("auto", {"mask_build": "host"}, ["'auto'", "mask_build='host'"]),
    ("flash", {}, ["'flash'", *NAMES]),
]


@pytest.mark.parametrize("kernel, options, words", BAD_OPTIONS)
def test_options_are_checked(kernel: str, options: dict[str, str], words: list[str]) -> None:
    q, k, v = packed([4], 2, 8)
    cu_seqlens = cumulative([4])
    with pytest.raises(KernelError) as caught:
        flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 4, kernel=kernel, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_flash_kernel_on_the_cpu_is_refused_by_the_call_itself() -> None:
    q, k, v = packed([4], 2, 80)
    cu_seqlens = cumulative([4])
    with pytest.raises(KernelError) as caught:
        flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 4, kernel="flash_attn_2")
    for words in ("device is cpu", "float32", "These can: sdpa_segments, sdpa_mask, reference"):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["sdpa_segments", "sdpa_mask"])
def test_lengths_that_may_change_are_no_work_for_kernels_by_the_hosts_lengths(name: str) -> None:
    request = Request(device=torch.device("cpu"), dtype=torch.float32, head_dim=8, may_change=True)
    with pytest.raises(KernelError, match=r"cu_seqlens may change \(a CUDA graph\)"):
        choose(request, name)
