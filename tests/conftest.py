import os


# Before anything imports torch, moshi or huggingface_hub: they read these once.
os.environ["NO_TORCH_COMPILE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# For the processes that tests start, too: two on two cores with two threads each wait for each other most of the time.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from hf_csm.models.moshi.tiny import write_tiny_moshi  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_moshi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Moshi, Mimi and tokenizer. Shared: do not write to it."""
    return write_tiny_moshi(tmp_path_factory.mktemp("base") / "tiny_moshi")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared RAVDESS: two speakers to train, two to validate, one to test; four emotions. Do not write."""
    from hf_csm.prepare.run import prepare
    from hf_csm.testing.ravdess import write_ravdess

    folder = tmp_path_factory.mktemp("corpus")
    raw = write_ravdess(
        folder / "raw",
        actors=(1, 2, 17, 18, 21),
        emotions=("neutral", "happy", "sad", "angry"),
        statements=(1, 2),
        repetitions=(1,),
        intensities=(1,),
        layout="actors",
        defects=False,
    )
    prepare("ravdess", raw, folder / "prepared", num_workers=1, progress=False)
    return folder / "prepared"


@pytest.fixture(scope="session")
def codes(tiny_moshi: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared RAVDESS encoded with the tiny Mimi in windows of up to 12 s. Do not write."""
    from hf_csm.encode.compose import Composition
    from hf_csm.encode.run import encode
    from hf_csm.models.moshi.checkpoint import codec_sha256, find_checkpoint
    from hf_csm.models.moshi.codec import load_codec

    base = find_checkpoint(str(tiny_moshi))
    out = tmp_path_factory.mktemp("codes") / "ravdess"
    composition = Composition(duration_s=12.0)
    encode(prepared, out, load_codec(base), codec_sha256(base), composition=composition, progress=False)
    return out
