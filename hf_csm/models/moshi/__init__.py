"""Moshi as a model family."""

from hf_csm.models.family import Family
from hf_csm.models.moshi.checkpoint import codec_sha256, find_checkpoint, is_same_base, load_tokenizer, split_adapter
from hf_csm.models.moshi.codec import load_codec
from hf_csm.models.moshi.engine import open_engine
from hf_csm.models.moshi.export import export_adapter
from hf_csm.models.moshi.layout import STREAM_NAMES, lay_out, stream_masks, stream_weights
from hf_csm.models.moshi.lora import adapter_disabled, adapter_parameters, add_lora, load_adapter, save_adapter
from hf_csm.models.moshi.merge import merge_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.tiny import write_tiny_moshi
from hf_csm.models.moshi.verify import verify_export


MOSHI = Family(
    name="moshi",
    stream_names=STREAM_NAMES,
    find_checkpoint=find_checkpoint,
    load_lm=load_moshi,
    load_codec=load_codec,
    load_tokenizer=load_tokenizer,
    codec_sha256=codec_sha256,
    lay_out=lay_out,
    stream_masks=stream_masks,
    stream_weights=stream_weights,
    add_lora=add_lora,
    load_adapter=load_adapter,
    save_adapter=save_adapter,
    adapter_parameters=adapter_parameters,
    adapter_disabled=adapter_disabled,
    export_adapter=export_adapter,
    merge_adapter=merge_adapter,
    verify_export=verify_export,
    split_adapter=split_adapter,
    is_same_base=is_same_base,
    open_engine=open_engine,
    write_tiny_checkpoint=write_tiny_moshi,
)
