"""From a table of codes to speech: a trained prefix changes what the model generates."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_csm.config import DatasetConfig, LoraSettings, MoshiPaths, OptimizerConfig, RunConfig, TrainingConfig
from hf_csm.models.emotion_control import read_emotion_control
from hf_csm.models.moshi import MOSHI
from hf_csm.training.loop import train
from hf_csm.units import SAMPLES_PER_FRAME
from tests.doubles.codes import RandomWindow, restate_sizes, write_random_codes


CODE_OF = {"happy": 11, "sad": 77}
"""The only code of Moshi's channel in windows of each emotion."""


def write_codes(folder, codec_sha256):
    windows = [RandomWindow(emotion, 30, "01", "train") for emotion in CODE_OF for _ in range(8)]
    windows += [RandomWindow(emotion, 30, "02", "validation") for emotion in CODE_OF for _ in range(2)]
    write_random_codes(folder, windows, codec_sha256=codec_sha256)
    for path in folder.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        codes = np.array(table["codes"].to_pylist()) % 128
        codes[:, 0] = next(code for emotion, code in CODE_OF.items() if emotion in path.name)
        field, column = table.schema.field("codes"), table.schema.get_field_index("codes")
        pq.write_table(table.set_column(column, field, pa.array(codes.tolist(), field.type)), path)
    restate_sizes(folder)
    return folder


def generated_codes(engine, prefix):
    """Return the codes of the first second of a new conversation with the prefix, `[T, Q]`."""
    engine.reset(0)
    engine.force_text(0, prefix)
    noise = 0.01 * np.random.default_rng(0).standard_normal((13, SAMPLES_PER_FRAME), dtype=np.float32)
    frames = [engine.step({0: frame}).get(0) for frame in noise]
    return np.stack([frame.codes for frame in frames if frame is not None])


@pytest.mark.slow
def test_the_emotion_in_the_prefix_decides_what_a_trained_adapter_generates(tiny_moshi, tmp_path):
    base = MOSHI.find_checkpoint(str(tiny_moshi))
    table = write_codes(tmp_path / "table", MOSHI.codec_sha256(base))
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        moshi_paths=MoshiPaths(str(tiny_moshi), dtype="float32"),
        dataset=DatasetConfig(
            manifest_path=str(table), duration_sec=2.4, batch_size=8, prefix_template="{emotion}", prefix_dropout=0.0
        ),
        lora=LoraSettings(rank=8, alpha=16),
        optimizer=OptimizerConfig(lr=0.004),
        training=TrainingConfig(max_steps=150, save_every=150, eval_every=150, trackers=[]),
    )
    trained = train(config, MOSHI)

    checkpoint, adapter = MOSHI.split_adapter(MOSHI.find_checkpoint(str(trained / "consolidated")), "trained")
    control, tokenizer = read_emotion_control(trained), MOSHI.load_tokenizer(checkpoint)
    engine = MOSHI.open_engine(checkpoint, [adapter], use_sampling=False)
    engine.set_strength(0, 0, 1.0)
    shares = {}
    for emotion in CODE_OF:
        codes = generated_codes(engine, control.tokens(emotion, tokenizer))
        shares[emotion] = {other: float((codes == code).mean()) for other, code in CODE_OF.items()}
    engine.close()
    assert shares["happy"]["happy"] > 0.8 > 0.2 > shares["happy"]["sad"]
    assert shares["sad"]["sad"] > 0.8 > 0.2 > shares["sad"]["happy"]
