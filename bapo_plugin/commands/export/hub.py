"""An adapter or a model, put on the hub: what is needed to use it, and nothing else of the run's folder."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from bapo_plugin.commands.export.result import Command, Result, size
from bapo_plugin.commands.export.source import TOKENIZER_FILES, Source, compare_templates
from bapo_plugin.runs import is_hub_name

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")
_CARD = "README.md"
# tokens of accounts (the hub, OpenAI and those like it, AWS, GitHub), and a key of the configuration that holds one
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|(?i:api_?key|secret|password|credential|_token)['\"]?\s*[:=]\s*['\"]?(?!null\b|<)[\w-]{12,}"
)
# from the root of a disk, with two parts or more; in an address something stands before
_PATH = re.compile(r"(?<![\w./~\\<])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+-]+){2,}")


def publish(
    source: Source,
    repo: str,
    *,
    base: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Result:
    """Upload an adapter or a whole model in one commit.

    Args:
        source: what is uploaded.
        repo: user/name. It is made where it isn't there.
        base: name of an adapter's base on the hub. Default: as the run has it.
        public: whether everybody may see it.
        dry_run: only say what would be uploaded; nothing reaches a network.
        say: told, before anything is sent, what will be.

    Raises:
        ValueError: the base has no name on the hub, a text to be uploaded holds what looks like a secret, the repository is
            public and `public` wasn't said, or the hub refuses.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise ValueError(
            f"--repo: {repo!r} is no name on the hub; it is like your-name/{source.name}"
        )
    template = compare_templates(source)
    if base:  # a revision is one of the base that the run recorded
        source = dataclasses.replace(source, base=base, revision=None)
    if source.adapter is not None and not is_hub_name(source.base):
        raise ValueError(
            f"the adapter's base is a folder of this machine ({source.base}), which says nothing to others; name the same "
            "model on the hub with --base user/model"
        )
    result = Result(
        [*source.facts(), ("template", template.phrase)], [*source.notes(), *template.notes]
    )
    kind = "public" if public else "private"
    result.facts.append(("to", f"{repo}, {kind}"))
    files = {path.name: _content(path, source, repo, result.notes) for path in _files(source)}
    if _CARD not in files:
        result.notes.append(f"{source.folder} has no card ({_CARD}): write one on the hub")
    result.found |= {"repo": repo, "private": not public, "files": sorted(files)}
    say(f"{'Would upload' if dry_run else 'Uploads'} to {repo} ({kind}):")
    for name, content in sorted(files.items()):
        number = len(content) if isinstance(content, bytes) else content.stat().st_size
        say(f"  {name}  {size(number)}")
    if dry_run:
        result.notes.append("Nothing was sent (--dry-run)")
        return result
    result.found["url"] = _upload(repo, files, public)
    result.facts.append(("commit", result.found["url"]))
    result.commands = [Command("Fetch it elsewhere", [["hf", "download", repo]])]
    if source.adapter is not None:
        result.commands.append(
            Command(
                "Or serve it with vLLM",
                [
                    ["vllm", "serve", source.base],
                    ["--enable-lora"],
                    ["--lora-modules"],
                    [f"{source.name}={repo}"],
                ],
            )
        )
    return result


def _files(source: Source) -> list[Path]:
    """What is uploaded; a run's folder holds much else, such as optimizer states, logs and the YAML's record."""
    names = _ADAPTER if source.adapter is not None else _MODEL
    found = [source.folder / name for name in (*names, _CARD)]
    if source.adapter is None:
        found += sorted(source.folder.glob("model*.safetensors"))
    if source.tokenizer_folder:
        found += [source.tokenizer_folder / name for name in TOKENIZER_FILES]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _content(path: Path, source: Source, repo: str, notes: list[str]) -> bytes | Path:
    """A text without what belongs to this machine, or the file itself."""
    if path.name == _CARD:
        text = path.read_text("utf-8")
        _refuse_secrets(path, text)
        if "[More Information Needed]" in text:
            notes.append(f"{_CARD} is PEFT's form, not filled in: write what the adapter is for")
        text = _card(text, source, repo)
        text, count = _PATH.subn(lambda found: _last(found[0]), text)
        if count:
            notes.append(
                f"{_CARD}: paths of this machine are cut down to their last part ({count})"
            )
        _refuse_secrets(path, text)
        return text.encode()
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json"):
        return path
    text = path.read_text("utf-8")
    _refuse_secrets(path, text)
    config = json.loads(text)
    own = {key: value for key, value in config.items() if not _is_path(value)}
    if path.name == "adapter_config.json":
        own |= {"base_model_name_or_path": source.base, "revision": source.revision}
    return path if own == config else json.dumps(own, indent=2, ensure_ascii=False).encode()


def _card(text: str, source: Source, repo: str) -> str:
    """The card that training wrote, with the names that base and adapter have on the hub."""
    if source.adapter is None:
        return text
    from huggingface_hub import ModelCard

    trained_on = Path(source.adapter.get("base_model_name_or_path") or source.base).name
    for before, after in (
        (f"`{trained_on}`", f"[{source.base}](https://huggingface.co/{source.base})"),
        (f'from_pretrained("{trained_on}")', f'from_pretrained("{source.base}")'),
        (
            f'from_pretrained(model, "{source.folder.resolve().name}")',
            f'from_pretrained(model, "{repo}")',
        ),
    ):
        text = text.replace(before, after)
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data.base_model = source.base
    # PEFT writes its own with the base as it was called here
    tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    card.data.tags = tags or None
    return str(card)


def _refuse_secrets(path: Path, text: str) -> None:
    if found := _SECRET.search(text):
        line = text[: found.start()].count("\n") + 1
        raise ValueError(
            f"{path}, line {line}, holds what looks like a secret ({found[0][:6]}...); take it out there, and revoke it if it "
            "was ever shared. Nothing was sent"
        )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (
        PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    )


def _last(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def _upload(repo: str, files: dict[str, bytes | Path], public: bool) -> str:
    """Address of the commit."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in sorted(files.items())
    ]
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ValueError(
                f"--repo: {repo} is there and public; say --public, or name another repository. Nothing was sent"
            )
        done = api.create_commit(repo, operations, commit_message="Upload by bapo export")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        said = _SECRET.sub("(not shown)", str(error).strip().splitlines()[0])
        raise ValueError(
            f"the hub didn't take it: {said}. `hf auth login` signs in; HF_HUB_OFFLINE must not be set"
        ) from None
    return str(done.commit_url)
