"""A folder with digests tells every kind of damage to its files, and which."""

import pytest

from oasis_jax import digests


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """Files of one piece, of three, and of none."""
    monkeypatch.setattr(digests, "PIECE", 1 << 16)
    monkeypatch.setattr(digests, "BLOCK", 1 << 12)
    (tmp_path / "in").mkdir()
    one, other = bytes(range(256)) * 16, b"some words, and more of them..  " * 128
    (tmp_path / "in/long").write_bytes(one + other + bytes(range(256)) * 568)
    (tmp_path / "short").write_bytes(b"some words")
    (tmp_path / "empty").touch()
    digests.seal(tmp_path)
    return tmp_path


def write(file, content, at):
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)


def swap(file, size):
    content = file.read_bytes()
    write(file, content[size : 2 * size] + content[:size], 0)


DAMAGE = {
    "flipped": (
        lambda folder: write(folder / "in/long", b"!", 70_000),
        "in/long was changed in bytes 65,536 to 131,071",
    ),
    "flipped at the end": (
        lambda folder: write(folder / "in/long", b"!", 153_598),
        "in/long was changed in bytes 131,072 to 153,599",
    ),
    "two blocks swapped": (
        lambda folder: swap(folder / "in/long", 4096),
        "in/long was changed in bytes 0 to 65,535",
    ),
    "cut": (
        lambda folder: (folder / "short").write_bytes(b"some"),
        "short has 4 bytes instead of 10",
    ),
    "grown": (
        lambda folder: (folder / "empty").write_bytes(b"!"),
        "empty has 1 bytes instead of 0",
    ),
    "gone": (lambda folder: (folder / "in/long").unlink(), "in/long is missing"),
    "foreign": (
        lambda folder: (folder / "in/other").touch(),
        "in/other was not there when it was written",
    ),
    "a digest flipped": (
        lambda folder: (folder / digests.NAME).write_text(
            (folder / digests.NAME).read_text().replace("10", "11")
        ),
        "digests.json was changed",
    ),
    "digests cut": (
        lambda folder: (folder / digests.NAME).write_text('{"files"'),
        "digests.json cannot be read",
    ),
    "no digests inside": (
        lambda folder: (folder / digests.NAME).write_text("[]"),
        "digests.json cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(sealed, damage, message):
    digests.check(sealed)
    before = digests.signature(sealed)
    damage(sealed)
    with pytest.raises(digests.Damaged) as caught:
        digests.check(sealed)
    assert str(caught.value) == message
    assert digests.signature(sealed) != before


def test_a_folder_without_digests_is_taken_at_its_word(sealed):
    (sealed / digests.NAME).unlink()
    (sealed / "short").unlink()
    digests.check(sealed)
    digests.complete(sealed)
    assert not (sealed / digests.NAME).exists()


def test_what_comes_later(sealed):
    """It may come, or not; once it is said to be there it counts."""
    digests.seal(sealed, later=["mark", "never"])
    digests.check(sealed)
    (sealed / "mark").write_text("done")
    digests.check(sealed)
    digests.complete(sealed)
    digests.check(sealed)
    (sealed / "mark").write_text("gone")
    with pytest.raises(digests.Damaged, match="mark was changed"):
        digests.check(sealed)
