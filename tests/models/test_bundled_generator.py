"""The bundled generator as it is pulled: ids and logits are those of the published model."""

import os

import pytest
import torch

from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.models.cache import models_home
from ragkit.models.tokenizer import ModelTokenizer

pytestmark = pytest.mark.models
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def folder():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAGKIT_HOME", raising=False)
        if "RAGKIT_TEST_HOME" in os.environ:
            patch.setenv("RAGKIT_HOME", os.environ["RAGKIT_TEST_HOME"])
        path = models_home() / NAME
    if not path.is_dir():
        pytest.skip(f"{NAME} is not pulled: run `ragkit models pull {NAME}`")
    return path


def test_ids_are_those_of_the_published_tokenizer(folder):
    tokenizer = ModelTokenizer(folder)
    assert tokenizer.encode("Hello, world 1234!") == [19556, 28, 905, 216, 33, 34, 35, 36, 17]
    assert tokenizer.encode_template("<|im_start|>user\nhi<|im_end|>\n") == [1, 4093, 198, 6004, 2, 198]


@torch.inference_mode()
def test_logits_are_those_of_transformers_in_fp32(folder):
    from transformers import AutoModelForCausalLM

    from ragkit.generation.attention import StandaloneAttention
    from ragkit.kvcache.rope import RotaryTable

    token_ids = ModelTokenizer(folder).encode("The Eiffel Tower was built by the company of Gustave Eiffel. " * 8)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([token_ids])).logits[0]
    decoder = Decoder.load(folder, torch.device("cpu"), torch.float32)
    rotary = RotaryTable.build(decoder.config.rope, decoder.config.head_dim, len(token_ids), decoder.device)
    got = decoder.logits(decoder.run(token_ids, StandaloneAttention(rotary, decoder.scale)))
    assert float((got - expected).abs().max()) < 2e-3  # of logits up to 30


def test_it_answers_from_a_passage(folder):
    from ragkit.types import Chunk

    engine = Engine.load(folder, device="cpu", dtype="float32")
    text = "The Eiffel Tower was designed and built by the company of Gustave Eiffel from 1887 to 1889."
    chunk = Chunk("c", "d", 0, text, 0, len(text), 1)
    built = engine.prompt_builder().build("Whose company built the Eiffel Tower?", [chunk], max_new_tokens=40)
    answer = "".join(step.piece for step in engine.generate(built.prompt, SamplingConfig(max_new_tokens=40)))
    assert "Gustave Eiffel" in answer
