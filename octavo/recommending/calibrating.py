"""Statistics for schemes that are only measured: of the kind that a conversion finds."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..common.convert.calibration.texts import LONGEST_SAMPLE, default_texts, read_calibration_file, tokenize
from ..common.convert.calibration.whole import calibrate_whole
from ..common.convert.source.checkpoint import load_source, load_tokenizer
from ..common.convert.source.config import chosen_architecture
from ..common.runtime.schemes.kv_scheme import load_scheme
from ..evaluation.reading import longest_of


@contextmanager
def calibrated(directory: Path, calib_file: Path | None, names: Sequence[str], device: str) -> Iterator[Path]:
    """A file of statistics, for as long as they are needed.

    Args:
        directory: of the float model, which is in memory meanwhile.
        calib_file: texts; None: those that come with Octavo, the last ones first, as what is measured is at the start.
        names: of the schemes that are to be measured.

    Raises:
        OctavoError: the model or the texts do not serve.
    """
    schemes = [scheme for scheme in map(load_scheme, names) if scheme.is_static]
    texts = default_texts()[::-1] if calib_file is None else read_calibration_file(calib_file)
    model = load_source(directory, device, chosen_architecture(directory, None))
    longest = min(LONGEST_SAMPLE, longest_of(model) or LONGEST_SAMPLE)
    tokenizer = load_tokenizer(directory, {}, False)
    samples = tokenize(tokenizer, texts, longest, "input_ids", "attention_mask")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "statistics.safetensors"
        calibrate_whole(model, samples, schemes).save(file)
        del model
        yield file
