"""How a model wants conversations written, by the files that come with it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tokenizers

from train.data.text import read_text
from train.data.tokenizer import SEPARATORS
from train.errors import DataError

NAMED = (
    "bos_token eos_token unk_token sep_token pad_token cls_token mask_token"
).split()
"""The special tokens that a template may ask for by name."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a model wants conversations written; made by `read_chat`.

    Attributes:
      sources: Templates by name, in Jinja's language: 'default', and maybe 'tool_use' for
        conversations with tools. Empty if the model has none.
      tokens: Special tokens by the names that templates know: `eos_token` and so on.
      stops: Tokens that end a text besides, as the model's generation_config.json has it.
      place: The file with the templates, for messages.
    """

    sources: dict[str, str]
    tokens: dict[str, str]
    stops: tuple[int, ...]
    place: str

    def end(self, tokenizer: tokenizers.Tokenizer) -> int:
        """The token that ends an answer whose template writes none.

        Raises:
          DataError: if there is none.
        """
        named = self.tokens.get("eos_token")
        for token in SEPARATORS if named is None else (named,):
            if (found := tokenizer.token_to_id(token)) is not None:
                return found
        raise DataError(
            "the tokenizer has no token that ends an answer: "
            + (
                f"none of {', '.join(SEPARATORS)}, and no eos_token in the model's"
                " tokenizer_config.json or special_tokens_map.json"
                if named is None
                else f"the eos_token {named!r} is not in its vocabulary"
            )
        )


def read_chat(folder: Path) -> Chat:
    """Reads what the folder says of chats and special tokens, as transformers does.

    Templates are in `chat_template.jinja` and `additional_chat_templates/`, else in
    `tokenizer_config.json`; special tokens there and in `special_tokens_map.json`; more
    tokens that end a text in `generation_config.json`. All may be absent.

    Raises:
      DataError: if one of them cannot be used.
    """
    file = folder / "tokenizer_config.json"
    config = _object(file)
    tokens, mapped = _tokens(file), _tokens(folder / "special_tokens_map.json")
    # Newer folders have all in the former; of older ones transformers takes the latter.
    newer = "added_tokens_decoder" in config
    tokens = mapped | tokens if newer else tokens | mapped
    place, sources = _sources(folder, file, config.get("chat_template"))
    return Chat(
        sources,
        tokens,
        _stops(folder / "generation_config.json"),
        str(place),
    )


def _sources(folder: Path, file: Path, stored: Any) -> tuple[Path, dict[str, str]]:
    """The templates, and where they are from."""
    found: dict[str, str] = {}
    if isinstance(stored, str):
        found = {"default": stored}
    elif isinstance(stored, list) and all(isinstance(one, dict) for one in stored):
        found = {str(one.get("name")): one.get("template", "") for one in stored}
    elif stored is not None:
        raise DataError(f"{file}: the chat template is malformed: {stored!r}")
    if (main := folder / "chat_template.jinja").is_file():
        file, found = main, {"default": read_text(main)}
    for more in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[more.stem] = read_text(more)
    if found and "default" not in found:
        raise DataError(f"{file}: the chat templates have no 'default'")
    for name, source in found.items():
        if not isinstance(source, str):
            raise DataError(
                f"{file}: the chat template {name!r} is malformed: {source!r}"
            )
    return file, found


def _stops(file: Path) -> tuple[int, ...]:
    stored = _object(file).get("eos_token_id")
    found = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(token) is int and token >= 0 for token in found):
        raise DataError(f"{file}: expected eos_token_id to be tokens, found {stored!r}")
    return tuple(found)


def _tokens(file: Path) -> dict[str, str]:
    """The special tokens that a file names."""
    tokens, stored = {}, _object(file)
    for name in NAMED:
        value = stored.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None:
            continue
        if not isinstance(content, str):
            raise DataError(f"{file}: expected {name} to be a token, found {value!r}")
        tokens[name] = content
    return tokens


def _object(file: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(read_text(file))
        if not isinstance(found, dict):
            raise ValueError(f"found {type(found).__name__}")
        return found
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON object: {error}") from error
