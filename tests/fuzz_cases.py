"The fuzzer's tiny files, for the tests (benchmarks/fuzz.py makes them)."
import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location('lora_nb_fuzz', Path(__file__).resolve().parents[1]/'benchmarks/fuzz.py')
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)
tiny_model, tiny_tokenizer, text_bytes = fuzz.tiny_model, fuzz.tiny_tokenizer, fuzz.text_bytes


def folder_of(path):
    "A whole tiny model in a new folder."
    from lora_nb.models import save_model
    return save_model(tiny_model(), path, tiny_tokenizer())
