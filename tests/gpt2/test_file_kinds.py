"""gpt2/file_kinds.py: error messages identify files and folders that are not models."""

import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from gpt2 import GPT2, convert
from gpt2.file_kinds import kind_of, kind_of_folder, read_json, text_in
from gpt2.formats.model_file import find_model
from tests.gpt2.formats.models import random_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 548105171\n"


def archive(**entries):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return content.getvalue()


def tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.safetensors"))
    return content.getvalue()


def array():
    content = io.BytesIO()
    np.save(content, np.zeros(3))
    return content.getvalue()


FILES = {
    "pointer.safetensors": (POINTER, "a Git LFS pointer, not the file itself; fetch the file with git lfs install"),
    "page.bin": (b"\n <!DOCTYPE html><html>", "an HTML page"),
    "page.pt": (b"\xef\xbb\xbf<html lang='en'>", "an HTML page"),
    "error.pt": (b"<?xml version='1.0'?><Error>", "an XML document"),
    "model.xml": (b'<?xml version="1.0"?>\n<net name="main_graph" version="11">', "an OpenVINO model"),
    "ctranslate2.bin": (b"\x06\0\0\0\x17\0TransformerDecoderSpec\0", "a CTranslate2 model"),
    "pickle.pt": (pickle.dumps({"weights": [1.0]}), "a Python pickle that torch.save did not write"),
    "line.safetensors": (b"Entry not found\n", "text, not a model: 'Entry not found'; if it was downloaded"),
    "answer.safetensors": (b'{"error": "Repository not found"}', "text, not a model: '{"),
    "__0_0.distcp": (bytes(64), "a part of a PyTorch distributed checkpoint (FSDP); merge its parts: "),
    "model.safetensors.incomplete": (bytes(64), "an unfinished download; download it again"),
    "gpt2.llamafile": (b"MZqFpD", "a llamafile of llama.cpp"),
    "model.gguf": (b"GGUF\x03\0\0\0", "a llama.cpp GGUF file"),
    "model.bin": (b"lmgg" + bytes(60), "a llama.cpp GGML file"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch\x1a", "an ONNX model"),
    "renamed.pt": (b"\x08\x07\x12\x07pytorch\x1a", "an ONNX model"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "a TensorFlow or Keras HDF5 file"),
    "model.tflite": (b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
    "model.ckpt.data-00000-of-00001": (bytes(64), "a part of a TensorFlow checkpoint"),
    "model.ckpt.index": (bytes(64), "a part of a TensorFlow checkpoint"),
    "saved_model.pb": (bytes(64), "a TensorFlow SavedModel"),
    "flax_model.msgpack": (b"\x82\xa6params", "a Flax model"),
    "a.npy": (array(), "a NumPy array"),
    "a.npz": (archive(**{"a.npy": array()}), "a NumPy .npz archive"),
    "a.tar": (tar(), "a tar archive; unpack it first"),
    "a.gz": (b"\x1f\x8b\x08" + bytes(9), "compressed with gzip; decompress it first"),
    "empty.safetensors": (b"", "an empty file"),
    "lfs.zip": (archive(**{"m/pytorch_model.bin": POINTER}), "in which m/pytorch_model.bin is a Git LFS pointer"),
    "whole.zip": (archive(**{"m/model.safetensors": bytes(99)}), "a zip archive with m/model.safetensors; unpack it"),
    "script.pt": (archive(**{"m/constants.pkl": b"", "m/data.pkl": b""}), "a TorchScript archive"),
    "a.keras": (archive(**{"config.json": "{}", "model.weights.h5": b"x"}), "a Keras model"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_identified(name, tmp_path, capsys):
    content, kind = FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    assert kind in (kind_of(file) or f"text, not a model: {text_in(file)!r}; if it was downloaded")
    assert convert.main([str(file), str(tmp_path / "out"), "--to", "hf"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpt2.convert: error: {file}: it is ")
    assert kind in line


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["pointer.safetensors", "page.bin", "lfs.zip"])
def test_a_file_in_a_model_folder_is_identified(name, kind, tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(FILES[kind][0])
    with pytest.raises(ValueError, match=FILES[kind][1]) as error:
        GPT2.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: ")


def test_models_are_not_mistaken_for_other_files(tmp_path):
    random_model().save_pretrained(tmp_path / "hf")
    for form in ("pt", "llmc"):
        convert.convert(tmp_path / "hf", tmp_path / form, form)
        assert kind_of(tmp_path / form) == ""
    assert kind_of(tmp_path / "hf" / "model.safetensors") == ""


FOLDERS = {
    "adapter": (
        {"adapter_config.json": json.dumps({"base_model_name_or_path": "gpt2"}), "adapter_model.safetensors": "x"},
        "an adapter (peft, LoRA) of gpt2, not a complete model; merge it",
    ),
    "openai": ({"hparams.json": "{}", "model.ckpt.index": "x", "encoder.json": "{}"}, "a TensorFlow checkpoint"),
    "flax": ({"flax_model.msgpack": "x", "vocab.json": "{}"}, "flax_model.msgpack is a Flax model"),
    "onnx": ({"decoder_model.onnx": "x"}, "decoder_model.onnx is an ONNX model"),
    "clone": ({"weights.safetensors": POINTER.decode()}, "weights.safetensors is a Git LFS pointer"),
    "tokenizer": ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "a folder with a tokenizer only"),
    "inside": ({"sub/config.json": "{}"}, "a folder with a model in sub/; use "),
    "cache": ({"snapshots/607a/config.json": "{}", "refs/main": "607a"}, "a folder of the Hugging Face cache; use "),
    "inside a folder": ({"onnx/model.onnx": "x"}, "a folder whose onnx/model.onnx is an ONNX model"),
    "deepspeed": (
        {"zero_to_fp32.py": "x", "global_step5/mp_rank_00_model_states.pt": "x"},
        "a DeepSpeed checkpoint; merge",
    ),
    "fsdp": ({"pytorch_model_fsdp_0/__0_0.distcp": "x"}, "__0_0.distcp is a part of a PyTorch distributed checkpoint"),
    "no index": ({"model-00001-of-00002.safetensors": "x"}, "without their index; add model.safetensors.index.json"),
    "state of a trainer": ({"optimizer.pt": "x", "scheduler.pt": "x"}, "optimizer.pt, the state of a trainer"),
    "lightning": ({"epoch=3-step=100.ckpt": "x"}, "a folder with epoch=3-step=100.ckpt; use "),
    "download": ({"model.safetensors.crdownload": "x"}, "model.safetensors.crdownload is an unfinished download"),
    "other name": ({"gpt2.safetensors": "{", "optimizer.pt": "x"}, "a folder with gpt2.safetensors; use "),
    "nothing": ({"readme.md": "x"}, ""),
}


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_is_identified(case, with_config, tmp_path, capsys):
    files, kind = FOLDERS[case]
    folder = tmp_path / "folder"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    assert kind_of_folder(folder).find(kind) >= 0
    if with_config:
        random_model().save_pretrained(folder)
        (folder / "model.safetensors").unlink()
    assert convert.main([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert kind in line
    assert str(folder) in line


def test_a_truncated_file_is_reported_as_truncated(tmp_path):
    random_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="its last tensor does not end at the end of the file; the download"):
        GPT2.from_pretrained(tmp_path)


def test_weights_without_a_config_are_found(tmp_path):
    """Published sizes need no config; for other sizes, loading reports that it is missing."""
    random_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert find_model(tmp_path, print) == tmp_path / "model.safetensors"


def test_json_is_read_in_every_unicode_encoding(tmp_path):
    file = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        file.write_text('{"a": "é"}', encoding=encoding)
        assert read_json(file) == {"a": "é"}
    for content, message in (
        (POINTER, "it is a Git LFS pointer"),
        (b"<html>", "it is an HTML page"),
        (b"", "it is an empty file"),
        (b"{", "it is not valid JSON"),
        (b'{"a": "\xe9"}', "it is not valid JSON"),
        (b"[" * 100_000, "it is not valid JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_json(file)
