"""The commands `varlen-vision infer` and `varlen-vision encode`, shared with `scripts/`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

from varlen_vision.errors import OutputError, VarlenVisionError
from varlen_vision.jobs import compare as comparison
from varlen_vision.jobs import leases
from varlen_vision.jobs.decode import MAX_PIXELS
from varlen_vision.jobs.encode import Encode
from varlen_vision.jobs.infer import Infer
from varlen_vision.jobs.job import Job
from varlen_vision.jobs.launch import Launch
from varlen_vision.jobs.options import Ended, Options, default_workers
from varlen_vision.jobs.run import run

UNUSABLE, ITEM_ERRORS, NOT_WRITTEN = 2, 3, 4
"""Exit status, beside 0: all done. Stopped by a signal: 128 and its number (Ctrl-C 130, SIGTERM 143)."""

WIDTH = 160
DTYPES = ("float32", "bfloat16", "float16")

Input = Annotated[Path, typer.Argument(help="A folder of images, or a JSONL of image/images, prompt and id.")]
Output = Annotated[Path, typer.Option(help="Folder of the run: results, and what a resume needs.")]
ModelName = Annotated[str, typer.Option("--model", help="Folder or hub name of a checkpoint.")]
Attn = Annotated[str, typer.Option(help="Attention of the vision part: varlen, sdpa_mask, sdpa, ...")]
Optimize = Annotated[
    str | None, typer.Option(help="With varlen: products, compile or graphs. \\[default: none]")
]
Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(DTYPES)}. \\[default: float32 on cpu, bfloat16 on cuda]")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1. \\[default: a GPU where there is one]")
]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that decode and preprocess. \\[default: free cores, at most 8]"),
]
Pixels = Annotated[
    int, typer.Option("--max-image-pixels", min=1, help="Larger images are refused as decompression bombs.")
]
Shard = Annotated[float, typer.Option(min=0.001, help="Size of a Parquet or safetensors file, in MB.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --output, or join others that are at it.")
]
Retry = Annotated[
    bool,
    typer.Option("--retry-failed", help="As --resume; then what had failed before is done again."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run in --output first.")]
Lease = Annotated[
    float, typer.Option(min=1, help="Seconds until a silent process of another machine is taken for dead.")
]


def infer(
    input: Input,
    model: ModelName,
    output: Output,
    prompt: Annotated[str | None, typer.Option(help="For items that bring none.")] = None,
    attn: Attn = "varlen",
    optimize: Optimize = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    token_budget: Annotated[
        int,
        typer.Option(min=1, help="Of a batch: its patches, text tokens and tokens to generate."),
    ] = 16384,
    dtype: Dtype = None,
    device: Device = None,
    workers: Workers = None,
    format: Annotated[str, typer.Option(help="jsonl or parquet.")] = "jsonl",
    shard_mb: Shard = 64,
    max_image_pixels: Pixels = MAX_PIXELS,
    resume: Resume = False,
    retry_failed: Retry = False,
    overwrite: Overwrite = False,
    lease_seconds: Lease = leases.EXPIRE,
    compare: Annotated[
        str,
        typer.Option(help="Run it once per attention (such as sdpa_mask,sdpa,varlen) and compare."),
    ] = "",
) -> None:
    """Ask a model about images: greedily, batched by token budget, resumable after a kill at any moment.

    Exit status: 0 all done, 2 unusable input, 3 all done but some items failed, 4 results could not be
    written, 130 stopped by Ctrl-C, 143 by SIGTERM. Several started with --resume, or under accelerate launch,
    share the work.
    """
    launch = Launch.of()
    table = _one_of(format, ("jsonl", "parquet"), "format") == "parquet"
    options = Options(
        input,
        output,
        prompt,
        token_budget,
        default_workers(launch.processes) if workers is None else workers,
        device,
        round(shard_mb * 1e6),
        resume,
        overwrite,
        retry_failed,
        lease_seconds,
    )

    def job(attn: str = attn) -> Infer:
        computed = _dtype(dtype, device)
        fast = None if compare and attn != "varlen" else optimize
        return Infer(_name(model), attn, fast, computed, max_new_tokens, max_image_pixels, table)

    if not compare:
        _go(job, options, launch)
    elif table or launch.processes > 1:
        raise typer.BadParameter("--compare is for one process and --format jsonl")
    else:
        _compare(job, compare.split(","), options)


def encode(
    input: Input,
    model: ModelName,
    output: Output,
    attn: Attn = "varlen",
    optimize: Optimize = None,
    max_patches: Annotated[int, typer.Option(min=1, help="Of a batch, before merging.")] = 16384,
    dtype: Dtype = None,
    save_dtype: Annotated[str | None, typer.Option(help="Of the features. \\[default: --dtype]")] = None,
    device: Device = None,
    workers: Workers = None,
    format: Annotated[str, typer.Option(help="safetensors or parquet.")] = "safetensors",
    shard_mb: Shard = 512,
    max_image_pixels: Pixels = MAX_PIXELS,
    resume: Resume = False,
    retry_failed: Retry = False,
    overwrite: Overwrite = False,
    lease_seconds: Lease = leases.EXPIRE,
) -> None:
    """Encode images with the vision tower alone: its tokens in shards, and index.jsonl to find them.

    Resumable and shared as `infer` is, with the same exit status.
    """
    launch = Launch.of()
    table = _one_of(format, ("safetensors", "parquet"), "format") == "parquet"
    options = Options(
        input,
        output,
        None,
        max_patches,
        default_workers(launch.processes) if workers is None else workers,
        device,
        round(shard_mb * 1e6),
        resume,
        overwrite,
        retry_failed,
        lease_seconds,
    )

    def job() -> Job:
        computed = _dtype(dtype, device)
        saved = _one_of(save_dtype or computed, DTYPES, "dtype")
        return Encode(_name(model), attn, optimize, computed, saved, max_image_pixels, table)

    _go(job, options, launch)


def _go(make: Callable[[], Job], options: Options, launch: Launch) -> None:
    with _clear_errors():
        ended = run(make(), options, launch)
    if launch.local_rank == 0 or ended.output_error is not None:
        report(ended, options)
    status = status_of(ended)
    # Launchers end all processes when one has a status; of those that are done, the first says it.
    if status and not (ended.finished and launch.rank > 0):
        raise typer.Exit(status)


def _compare(make: Callable[[str], Infer], paths: list[str], options: Options) -> None:
    with _clear_errors():
        outcomes, ended = comparison.compare(make, paths, options)
    if outcomes:
        _console().print(comparison.table(outcomes, make(paths[0]).dtype))
    if not ended[-1].finished:
        report(ended[-1], options)
    if status := max(map(status_of, ended)):
        raise typer.Exit(status)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Say what was wrong, and end with the status that tells."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except OutputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(NOT_WRITTEN) from error
    except VarlenVisionError as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        typer.echo("\nstopped; --resume goes on", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None


def status_of(ended: Ended) -> int:
    """The exit status of a run."""
    if ended.output_error is not None:
        return NOT_WRITTEN
    if not ended.finished:
        return 128 + (ended.signal or signal.SIGINT)
    return ITEM_ERRORS if ended.account.failed else 0


def report(ended: Ended, options: Options) -> None:
    """Print the account, and what to do next."""
    console = _console()
    account, left_out = ended.account, ended.source.left_out
    if account.batches:
        console.print(account.table())
    lines = account.lines()
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        lines.append(f"left out, by their names no images: {', '.join(left_out[:3])}{more}")
    if ended.output_error is not None:
        lines += [f"Error: {ended.output_error}", "then run it again with --resume; nothing written is lost"]
    elif not ended.finished:
        lines.append("stopped; run it again with --resume")
    else:
        lines.append(f"results: {options.output}")
        if account.failed:
            lines.append("what failed stays so; run it again with --retry-failed to do it again")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise typer.BadParameter(f"unknown {what} {value!r}; known: {', '.join(known)}")
    return value


def _dtype(asked: str | None, device: str | None) -> str:
    on_gpu = (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    return _one_of(asked or ("bfloat16" if on_gpu else "float32"), DTYPES, "dtype")


def _name(model: str) -> str:
    """A folder by its full path, so that a run is known again from anywhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
