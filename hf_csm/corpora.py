"""Registry of the corpora in `dataset_builders`: list them, open one as a stream, create a builder."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hf_csm.errors import UserError


if TYPE_CHECKING:  # `datasets` takes seconds to import, and `hf-csm --help` lists the names
    from hf_csm.prepare.builder import CorpusBuilder


def load_corpus(
    name: str,
    data_dir: str | Iterable[str] | None = None,
    split: str | None = None,
    streaming: bool = True,
    **options: Any,
) -> Any:
    """Open a raw corpus as utterance rows (`UTTERANCE_FEATURES`), computed during iteration; nothing is written.

    Args:
        name: a module of `dataset_builders`.
        data_dir: folder, zip or URL of the raw corpus, or several; `None` downloads it from where it is published.
        split: train, validation or test; `None` for all of them in a dict.
        streaming: `False` builds a table in the cache of `datasets` first and gives random access.
        options: of the corpus, and `align_model`.

    Raises:
        UserError: unknown corpus, option or split, or a raw corpus that cannot be read.
    """
    from hf_csm.data.schema import SPLITS
    from hf_csm.prepare.checks import hash_listing

    if split is not None and split not in SPLITS:
        raise UserError(f"Unknown split {split!r}.", f"Splits are {', '.join(SPLITS)}.")
    builder = make_builder(name, data_dir, **options)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    listing = hash_listing(builder.shards()[0])
    cached = type(builder)(**{**builder.config_kwargs, "listing": listing})
    cached.download_and_prepare()
    return cached.as_dataset(split=split)


def corpus_names() -> list[str]:
    """Return the names of all corpora, sorted."""
    import dataset_builders

    return sorted(module.name for module in pkgutil.iter_modules(dataset_builders.__path__))


def all_builders() -> list[type[CorpusBuilder]]:
    """Return the builders of all corpora, sorted by name."""
    return [_builder_class(name) for name in corpus_names()]


def _builder_class(name: str) -> type[CorpusBuilder]:
    from hf_csm.prepare.builder import CorpusBuilder

    module = importlib.import_module(f"dataset_builders.{name}")
    (builder_class,) = (
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, CorpusBuilder) and value.__module__ == module.__name__
    )
    return builder_class


def make_builder(name: str, data_dir: Any = None, /, **options: Any) -> CorpusBuilder:
    """Return the builder of a corpus, without a cache. Arguments as in `load_corpus`."""
    from hf_csm.prepare.builder import config_options

    classes = {builder.NAME: builder for builder in all_builders()}
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
        raise UserError(
            f"Unknown corpus {name!r}.{f' Did you mean {near[0]!r}?' if near else ''}",
            f"Corpora are: {', '.join(classes)}.",
        )
    builder_class = classes[name]
    known = {option.name for option in config_options(builder_class.BUILDER_CONFIG_CLASS)}
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}.", f"Its options are: {', '.join(sorted(known))}.")
    sources: list[str] | None = None
    if data_dir is not None:
        sources = [str(source) for source in data_dir] if isinstance(data_dir, (list, tuple)) else [str(data_dir)]
    # `datasets` makes and locks a cache folder for every builder, although a stream needs none.
    with tempfile.TemporaryDirectory() as cache:
        return builder_class(cache_dir=cache, sources=sources, **options)
