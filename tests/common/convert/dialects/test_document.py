"""docs/formats.md is what the writers state."""

from octavo.common.convert.dialects.document import COMMAND, document
from octavo.common.convert.dialects.table import DIALECTS
from octavo.common.convert.request import TARGETS

from ....support import REPOSITORY


def test_the_document_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8") == document(), COMMAND


def test_every_engine_of_every_dialect_is_in_it() -> None:
    text = document()
    for dialect in DIALECTS.values():
        assert f"## {dialect.name}\n" in text
        assert all(f"| {engine.name} | {engine.versions} | {engine.level} |" in text for engine in dialect.engines)
    assert all(f"with `--target {target}` |" in text for target in TARGETS)
