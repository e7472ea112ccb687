"""What `bapo export` does: what training left, as others take it, with checks in between and the next command at the end.

The work is PEFT's, vLLM's, llama.cpp's and the hub's. Only `hub` reaches a network; everything else finds the base on this machine.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from bapo_plugin.commands.export.fit import check_base
from bapo_plugin.commands.export.result import Result
from bapo_plugin.commands.export.source import read_source

KINDS = ("merged", "vllm", "gguf", "hub")


def export(
    targets: Sequence[Path],
    to: str,
    *,
    output: Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
    rounded: bool = False,
    check: bool = True,
    outtype: str = "q8_0",
    as_adapter: bool = False,
    llama_cpp: Path | None = None,
    repo: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Result:
    """Export a run.

    Args:
        targets: folder of a run, of a checkpoint in it, or a YAML; several for vLLM only.
        to: of `KINDS`.
        output: folder to write to; the default is one in the run's.
        base: folder or name of the base model, in place of what the run recorded.
        dtype, rounded: of `merged` and `gguf`; see `merged.merge`.
        check: that the base is the one of training; of `merged` and `gguf` also what was merged, see `merged.merge`.
        outtype, as_adapter, llama_cpp: of `gguf`; see `gguf.convert`.
        repo, public, dry_run, say: of `hub`; see `hub.publish`.

    Raises:
        ValueError: what is named can't be exported so; see the modules.
    """
    if to not in KINDS:
        raise ValueError(f"--to: {to!r} must be one of {', '.join(KINDS)}")
    if len(targets) > 1 and to != "vllm":
        raise ValueError(f"--to {to} takes one run; only vLLM serves several at a time")
    sources = [read_source(target, None if to == "hub" else base) for target in targets]
    source = sources[0]
    if check and to != "hub":  # nothing of the base is uploaded
        for one in sources:
            check_base(one)
    if to == "vllm":
        from bapo_plugin.commands.export.vllm import serve

        return serve(sources, output)
    if to == "hub":
        from bapo_plugin.commands.export.hub import publish

        if not repo:
            raise ValueError("--to hub needs --repo user/name")
        return publish(source, repo, base=base, public=public, dry_run=dry_run, say=say)
    if to == "gguf":
        from bapo_plugin.commands.export.gguf import convert

        return convert(
            source,
            output,
            outtype=outtype,
            as_adapter=as_adapter,
            llama_cpp=llama_cpp,
            dtype=dtype,
            rounded=rounded,
            check=check,
        )
    from bapo_plugin.commands.export.merged import merge

    return merge(source, output, dtype=dtype, rounded=rounded, check=check, named=base)
