"""SGLang's own Llama, and nothing else."""

from sglang.srt.models.llama import LlamaForCausalLM

EntryClass = LlamaForCausalLM
