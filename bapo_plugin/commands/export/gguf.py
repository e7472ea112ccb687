"""GGUF files for llama.cpp and Ollama: by llama.cpp's own converters, run where they are named, else printed.

A merged model becomes one file, whatever the adapter is. `as_adapter` makes a small file that is loaded over the base's GGUF; the
converter and llama.cpp scale every layer by lora_alpha / r, so that only plain LoRA comes out right.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bapo_plugin.commands.export.result import ELSEWHERE, Command, Result
from bapo_plugin.commands.export.source import Source, compare_templates
from bapo_plugin.commands.export.vllm import not_plain
from bapo_plugin.files import write_whole

_MODEL, _LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
# choices that both converters have
OUTTYPES = ("q8_0", "bf16", "f16", "f32", "auto")
_OLLAMA = (
    "Ollama knows a chat template in a GGUF file only if it is close to one of its own; else it sends what is asked without any. "
    "`ollama show NAME --template` must show more than {{ .Prompt }}"
)


def convert(
    source: Source,
    output: Path | None = None,
    *,
    outtype: str = "q8_0",
    as_adapter: bool = False,
    llama_cpp: Path | None = None,
    dtype: str | None = None,
    rounded: bool = False,
    check: bool = True,
) -> Result:
    """Merge where needed, write Ollama's Modelfile, and convert, or print the commands that do.

    Args:
        source: an adapter or a whole model.
        output: folder of the GGUF file and the Modelfile. Default: `gguf` in the run's. The merged model goes to `merged`
            in it, unless it lies there or in the run's folder.
        outtype: of `OUTTYPES`.
        as_adapter: no merging: a GGUF file of the adapter alone.
        llama_cpp: folder of llama.cpp with the converters; default: those on PATH.
        dtype, rounded, check: see `merged.merge`; here float16 is the default, which keeps what bfloat16 would round away.

    Raises:
        ValueError: there is no converter where one was named, it fails, or the adapter can't be converted as it was trained.
    """
    if llama_cpp and not (llama_cpp / _MODEL).is_file():
        raise ValueError(f"--llama-cpp: {llama_cpp} has no {_MODEL}; name a checkout of llama.cpp")
    output = output or source.folder / "gguf"
    name = source.name
    if as_adapter:
        result = _adapter(source, output, name, outtype)
    else:
        result = _merged(source, output, name, outtype, dtype or "float16", rounded, check)
    model = output / result.found["gguf"]
    if model.exists():
        raise ValueError(
            f"{model} exists, and nothing is overwritten; remove it, or name another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    modelfile = _modelfile(model)
    if not modelfile.exists():  # else it may have been edited
        text = "".join(f"{line}\n" for line in result.found["modelfile"])
        write_whole(modelfile, text, ELSEWHERE)
        result.wrote.append(modelfile)
    result.notes.append(_OLLAMA.replace("NAME", name))
    rest = []
    for command in result.commands:
        script = _script(command)
        if script and _target(command).exists():
            continue  # the base, converted for another adapter
        if script and (path := _find(script, llama_cpp)):
            result.wrote.append(_run(path, command))
        else:
            rest.append(command)
    if any(map(_script, rest)):
        result.notes.append(
            "No llama.cpp was named (--llama-cpp DIR) or found on PATH: its converter is to be run as below"
        )
    result.commands = rest
    return result


def check_adapter(source: Source) -> None:
    """
    Raises:
        ValueError: llama.cpp would refuse the adapter, or scale it otherwise than training did.
    """
    adapter = source.adapter or {}
    source.check_base_is_found_again()
    reason = "it is a whole model" if source.adapter is None else not_plain(source)
    if not reason and adapter.get("use_rslora"):
        reason = "rsLoRA's scale is lora_alpha / sqrt(r), and llama.cpp takes lora_alpha / r"
    if not reason and adapter.get("alpha_pattern"):
        reason = "llama.cpp knows one lora_alpha for all layers (alpha_pattern)"
    others = [name for name in source.tensors() if ".lora_" not in name] if not reason else []
    if others:
        reason = f"it holds weights beside LoRA's, such as {others[0]}"
    if reason:
        raise ValueError(
            f"--adapter: {source.folder} can't become a GGUF adapter as it was trained: {reason}; leave out --adapter, and it "
            "is merged"
        )


def _merged(
    source: Source, output: Path, name: str, outtype: str, dtype: str, rounded: bool, check: bool
) -> Result:
    from bapo_plugin.commands.export.merged import RECORD, adapter_hash, merge

    wanted = {"rounded": rounded, "dtype": dtype}
    if source.adapter is not None:
        wanted |= {"adapter_sha256": adapter_hash(source), "base": source.base}
        wanted["revision"] = source.revision
    made = next(
        (
            folder
            for folder in (source.folder / "merged", output / "merged")
            if _is(folder / RECORD, wanted)
        ),
        None,
    )
    if source.adapter is not None and made:
        template = compare_templates(source)
        result = Result(source.facts(), [*source.notes(), *template.notes])
        result.facts += [("template", template.phrase), ("merged", f"{made}, made before")]
        result.found["folder"] = str(made)
    else:
        result = merge(source, output / "merged", dtype=dtype, rounded=rounded, check=check)
    folder, file = Path(result.found["folder"]), f"{name}-{outtype}.gguf"
    result.found |= {"gguf": file, "modelfile": [f"FROM ./{file}"]}
    result.commands = [
        _conversion(_MODEL, folder, output / file, outtype),
        Command(
            "Ask it with llama.cpp", [["llama-server"], ["-m", str(output / file)], ["--jinja"]]
        ),
        *_ollama(name, output / file),
    ]
    return result


def _is(record: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder has the model that is wanted, merged before."""
    if not record.is_file():
        return False
    made = json.loads(record.read_text("utf-8"))
    return all(made.get(key) == value for key, value in wanted.items())


def _adapter(source: Source, output: Path, name: str, outtype: str) -> Result:
    check_adapter(source)
    template = compare_templates(source)
    base = source.base_folder()
    result = Result(source.facts(), [*source.notes(), *template.notes])
    result.facts.append(("template", template.phrase))
    below, file = f"{_name_of_base(source, base)}-{outtype}.gguf", f"{name}-lora-{outtype}.gguf"
    result.found |= {"gguf": file, "modelfile": [f"FROM ./{below}", f"ADAPTER ./{file}"]}
    serve = [["llama-server"], ["-m", str(output / below)], ["--lora", str(output / file)]]
    if template.text and not template.is_base:
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{name}-lora.jinja"
        write_whole(path, template.text, ELSEWHERE)
        result.wrote.append(path)
        serve += [["--jinja"], ["--chat-template-file", str(path)]]
        result.notes.append(
            "The base's GGUF file has the base's template, and Ollama takes that one: give Ollama the merged model (without "
            "--adapter)"
        )
    result.commands = [
        _conversion(_LORA, source.folder, output / file, outtype, ["--base", str(base)]),
        _conversion(_MODEL, base, output / below, outtype),
        Command("Ask it with llama.cpp", serve),
        *_ollama(name, output / file),
    ]
    return result


def _name_of_base(source: Source, base: Path) -> str:
    """Another for each base: adapters of several may lie in one folder."""
    name = re.sub(r"[^\w.-]+", "-", Path(source.base).name, flags=re.ASCII).strip("-.") or "base"
    # of a model of the hub the folder names the revision
    return f"{name}-{hashlib.sha256(str(base.resolve()).encode()).hexdigest()[:8]}"


def _conversion(script: str, folder: Path, file: Path, outtype: str, *more: list[str]) -> Command:
    about = "Convert the adapter" if script == _LORA else "Convert the model"
    parts = [["python", f"llama.cpp/{script}"], [str(folder)], *more]
    return Command(about, [*parts, ["--outfile", str(file)], ["--outtype", outtype]])


def _script(command: Command) -> str | None:
    """The converter that a command runs."""
    name = Path(command.parts[0][-1]).name
    return name if name in (_MODEL, _LORA) else None


def _target(command: Command) -> Path:
    """The file that a converter writes."""
    return next(Path(group[1]) for group in command.parts if group[0] == "--outfile")


def _modelfile(model: Path) -> Path:
    return model.with_suffix(".Modelfile")


def _ollama(name: str, model: Path) -> list[Command]:
    make = [["ollama", "create", name], ["-f", str(_modelfile(model))]]
    return [
        Command("Or with Ollama", make),
        Command("Look at its template", [["ollama", "show", name, "--template"]]),
    ]


def _find(script: str, llama_cpp: Path | None) -> Path | None:
    if llama_cpp:
        return llama_cpp / script
    found = shutil.which(script)
    return Path(found) if found else None


def _run(script: Path, command: Command) -> Path:
    """Convert; the file has its name only when it is whole."""
    words = [word for group in command.parts[1:] for word in group]
    place = words.index("--outfile") + 1
    target = _target(command)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as folder:
        words[place] = str(Path(folder) / target.name)
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
        if done.returncode or not Path(words[place]).is_file():
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            raise ValueError(
                f"{script} failed with exit code {done.returncode}; it said last:\n{said}\nIts own requirements are in "
                "llama.cpp's requirements.txt"
            )
        Path(words[place]).replace(target)
    return target
