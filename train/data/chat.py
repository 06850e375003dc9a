"""Conversations as text, by the template that comes with a model."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

from train.data.text import read_text
from train.data.tokenizer import SEPARATORS
from train.errors import DataError

Messages = list[dict[str, Any]]
"""Turns of a conversation; each has at least a `role` and a `content`."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a model wants conversations written; made by `read_chat`.

    Attributes:
      source: The template, in Jinja's language; None if the model has none.
      tokens: Special tokens by the names that templates know: `eos_token` and so on.
    """

    source: str | None
    tokens: dict[str, str]
    template: jinja2.Template | None = dataclasses.field(repr=False)

    def render(self, messages: Messages, place: str, *, answer: bool) -> str:
        """Writes a conversation, and with `answer` the beginning of the next turn.

        The template may ask for today's date, so the text can differ between days.

        Raises:
          DataError: if the template refuses; it says so of `place`.
        """
        assert self.template is not None
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=answer, **self.tokens
            )
        except Exception as error:  # a template is a program, of someone else
            raise DataError(
                f"{place}: the model's chat template refuses this conversation: {error}"
            ) from error

    def end(self, tokenizer: tokenizers.Tokenizer) -> int:
        """The token that ends an answer.

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
                " tokenizer_config.json"
                if named is None
                else f"the eos_token {named!r} is not in its vocabulary"
            )
        )


def read_chat(folder: Path) -> Chat:
    """Reads `chat_template.jinja` and `tokenizer_config.json`, as far as they are there.

    Raises:
      DataError: if one of them cannot be used.
    """
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if path.is_file():
        try:
            config = dict(json.loads(read_text(path)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is no JSON object: {error}") from error
    tokens = {
        name: val.get("content", "") if isinstance(val, dict) else val
        for name, val in config.items()
        if name.endswith("_token") and isinstance(val, str | dict)
    }
    source = config.get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        path, source = file, read_text(file)
    try:
        if isinstance(source, list):
            source = {one["name"]: one["template"] for one in source}["default"]
        template = None if source is None else _environment().from_string(source)
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"{path}: the chat template is malformed: {error}") from error
    except KeyError as error:
        raise DataError(f"{path}: the chat templates have no {error}") from error
    return Chat(source, tokens, template)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words, for those who ask; we do not."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """What templates expect to find, as in the transformers library."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson  # Jinja's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
