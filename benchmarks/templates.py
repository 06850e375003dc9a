"""What chat templates write here, and by `apply_chat_template` of transformers.

    pip install transformers        # or the extra test-hf
    python benchmarks/templates.py

Templates of the shapes of Llama 3, Qwen 2.5 and 3, Mistral, Gemma, ChatML, DeepSeek and
SmolLM3 write rows with thoughts, tools, documents and dates. Compared are all texts, with
and without the words that ask for an answer, and what {% generation %} marks. Prints a
table, writes results/templates.json, and what transformers wrote as the suite's oracle.
"""

import datetime
import json
from importlib.metadata import version
from pathlib import Path
from unittest import mock

from train.data import rendering

TEMPLATES = Path(__file__).parent.parent / "tests" / "fixtures" / "templates"
NOW = datetime.datetime(2026, 2, 3, 4, 5, 6)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def theirs(source: str, row: dict, prompt: bool) -> tuple[str | None, list]:
    """What transformers writes and marks; None if the template refuses."""
    from transformers.utils import chat_template_utils as utils

    given = {key: value for key, value in row.items() if key != "messages"}
    # As `apply_chat_template` does before it renders.
    messages = utils._normalize_chat_messages(row["messages"])
    marked = "{% generation %}" in source and not prompt
    with mock.patch.object(utils, "datetime") as clock:
        clock.now.return_value = NOW
        try:
            texts, spans = utils.render_jinja_template(
                [messages],
                chat_template=source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **(TOKENS | given),
            )
        except Exception:
            return None, []
    return texts[0], [list(span) for span in spans[0]] if marked else []


def ours(source: str, row: dict, prompt: bool) -> tuple[str | None, list]:
    """The same, here."""
    template = rendering.Template(source, TOKENS, (), NOW)
    messages = row["messages"]
    try:
        text = template.text(row, messages, prompt=prompt)
        written = None if prompt else template.write(row)
    except rendering.TemplateError:
        return None, []
    if written is None or not written.marked:
        return text, []
    return text, [list(span) for span in written.answers]


def main() -> None:
    rows = json.loads((TEMPLATES / "rows.json").read_text())
    recorded, table = {}, []
    for file in sorted(TEMPLATES.glob("*.jinja")):
        source = file.read_text()
        counts = {"equal": 0, "refused by both": 0, "different": 0}
        for name, row in rows.items():
            for prompt in (False, True):
                want, got = theirs(source, row, prompt), ours(source, row, prompt)
                same = "equal" if want[0] is not None else "refused by both"
                counts[same if want == got else "different"] += 1
                recorded.setdefault(file.stem, {})[f"{name}, {prompt}"] = want
        table.append({"template": file.stem, **counts})
    names = list(table[0])
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for line in table:
        print("| " + " | ".join(str(line[name]) for name in names) + " |")
    used = {"transformers": version("transformers"), "jinja2": version("jinja2")}
    results = Path(__file__).parent / "results" / "templates.json"
    results.write_text(json.dumps({"versions": used, "table": table}, indent=2) + "\n")
    oracle = json.dumps(recorded, indent=1, ensure_ascii=False)
    (TEMPLATES / "rendered.json").write_text(oracle + "\n")


if __name__ == "__main__":
    main()
