"""Makes the goldens of this folder: a tiny Llama with ternary weights, adapters that PEFT saved for it, and the logits that
transformers computes with and without them.

    pip install torch==2.8.0 transformers==4.57.1 peft==0.17.1
    python make_adapter.py
"""

import copy
import json
import os
import shutil

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

here = os.path.dirname(os.path.abspath(__file__))
torch.manual_seed(1)
config = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
        elif "_proj" in name:
            # -s, 0 and s, with one s for each row.
            codes = torch.randint(-1, 2, parameter.shape).float()
            scales = 0.1 + 0.1 * torch.rand(parameter.shape[0], 1)
            parameter.copy_(codes * scales)
        else:
            parameter.copy_(torch.randn_like(parameter))
        # What the file holds.
        parameter.copy_(parameter.bfloat16().float())
base = os.path.join(here, "base")
shutil.rmtree(base, ignore_errors=True)
# A copy: RoPE's frequencies stay F32 in the model.
copy.deepcopy(model).bfloat16().save_pretrained(base)
os.remove(os.path.join(base, "generation_config.json"))

tokens = torch.tensor([[0, 5, 17, 40, 3, 3, 29, 11, 46, 8, 22, 35]])
results = {"tokens": tokens[0].contiguous()}


def logits(model):
    with torch.no_grad():
        return model(tokens).logits[0].float().contiguous()


results["base"] = logits(model)
plain = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
patterns = LoraConfig(
    task_type="CAUSAL_LM",
    r=2,
    lora_alpha=3,
    use_rslora=True,
    target_modules=["q_proj", "k_proj", "down_proj"],
    rank_pattern={"down_proj": 3},
    alpha_pattern={"layers.1.self_attn.q_proj": 5},
)
for name, lora, dtype in [("plain", plain, torch.float32), ("patterns", patterns, torch.float16)]:
    adapted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_((0.3 * torch.randn_like(parameter)).to(dtype).float())
    results[name] = logits(adapted)
    directory = os.path.join(here, name)
    shutil.rmtree(directory, ignore_errors=True)
    if dtype != torch.float32:
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(directory)
    os.remove(os.path.join(directory, "README.md"))
    path = os.path.join(directory, "adapter_config.json")
    with open(path) as file:
        written = json.load(file)
    written["base_model_name_or_path"] = "base"
    # Sets, whose order changes from run to run.
    if isinstance(written["target_modules"], list):
        written["target_modules"].sort()
    with open(path, "w") as file:
        json.dump(written, file, indent=2, sort_keys=True)
        file.write("\n")
    model = adapted.unload()
assert torch.equal(logits(model), results["base"])
save_file(results, os.path.join(here, "logits.safetensors"))
