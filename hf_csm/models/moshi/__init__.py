"""Moshi as a model family."""

from hf_csm.hub import CONFIG_NAME
from hf_csm.models.family import Family
from hf_csm.models.moshi.checkpoint import (
    base_urls,
    codec_sha256,
    find_checkpoint,
    is_same_base,
    load_tokenizer,
    split_adapter,
)
from hf_csm.models.moshi.codec import load_codec
from hf_csm.models.moshi.engine import open_engine
from hf_csm.models.moshi.export import LORA_NAME, export_adapter
from hf_csm.models.moshi.layout import STREAM_NAMES, lay_out, stream_masks, stream_weights
from hf_csm.models.moshi.lora import adapter_disabled, adapter_parameters, add_lora, load_adapter, save_adapter
from hf_csm.models.moshi.merge import WEIGHTS_NAME, merge_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.verify import verify_export


MOSHI = Family(
    name="moshi",
    stream_names=STREAM_NAMES,
    find_checkpoint=find_checkpoint,
    load_lm=load_moshi,
    load_codec=load_codec,
    load_tokenizer=load_tokenizer,
    codec_sha256=codec_sha256,
    base_urls=base_urls,
    lay_out=lay_out,
    stream_masks=stream_masks,
    stream_weights=stream_weights,
    add_lora=add_lora,
    load_adapter=load_adapter,
    save_adapter=save_adapter,
    adapter_parameters=adapter_parameters,
    adapter_disabled=adapter_disabled,
    adapter_files=(LORA_NAME, CONFIG_NAME),
    merged_files=(WEIGHTS_NAME, CONFIG_NAME),
    export_adapter=export_adapter,
    merge_adapter=merge_adapter,
    verify_export=verify_export,
    split_adapter=split_adapter,
    is_same_base=is_same_base,
    open_engine=open_engine,
)
