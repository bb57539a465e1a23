import dataclasses
import hashlib
import json
import struct
import subprocess
import sys

import pytest
import torch
from kv_samples import CONFIG

from ragkit.errors import KVCacheError
from ragkit.kvcache.kv_key import KV_FORMAT_VERSION, ChunkContext, KVKey, KVRecipe
from ragkit.models.model_config import RopeType

RECIPE = KVRecipe("a" * 64, CONFIG, "tokenizer", torch.bfloat16, "int4")
ISOLATED = ChunkContext.isolated()
TOKENS = (1, 2, 3)


def test_equal_inputs_have_one_key():
    assert RECIPE.key(TOKENS, ISOLATED) == dataclasses.replace(RECIPE).key(list(TOKENS), ISOLATED)


@pytest.mark.parametrize(
    "change",
    [
        {"weights_fingerprint": "b" * 64},
        {"config": dataclasses.replace(CONFIG, rms_norm_eps=1e-6)},
        {"config": dataclasses.replace(CONFIG, rope=dataclasses.replace(CONFIG.rope, rope_type=RopeType.YARN))},
        {"config": dataclasses.replace(CONFIG, rope=dataclasses.replace(CONFIG.rope, theta=10001.0))},
        {"tokenizer_id": "other"},
        {"dtype": torch.float32},
        {"codec_id": "int8"},
        {"tenant_salt": "tenant"},
        {"format_version": 2},
    ],
)
def test_everything_that_changes_the_numbers_changes_the_key(change):
    assert dataclasses.replace(RECIPE, **change).key(TOKENS, ISOLATED) != RECIPE.key(TOKENS, ISOLATED)


@pytest.mark.parametrize("salt", ["", 'Käse "\\ \0'])
@pytest.mark.parametrize("context", [ISOLATED, ChunkContext.neighbours((1, 2), (3,)), ChunkContext.prefix(())])
def test_a_key_is_the_digest_of_all_settings_in_the_order_of_their_names(salt, context):
    recipe = dataclasses.replace(RECIPE, tenant_salt=salt)
    settings = {
        "weights": "a" * 64, "config": dataclasses.asdict(CONFIG), "tokenizer": "tokenizer", "dtype": "torch.bfloat16",
        "codec": "int4", "salt": salt, "format": KV_FORMAT_VERSION, "context": context.context_id,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + b"\0")
    digest.update(hashlib.sha256(struct.pack("=3q", *TOKENS)).digest())
    assert recipe.key(TOKENS, context).digest == digest.hexdigest()


@pytest.mark.parametrize("tokens", [(1, 2), (1, 3, 2), (1, 2, 3, 0), (1, 2 + 256, 3), ()])
def test_other_tokens_have_another_key(tokens):
    assert RECIPE.key(tokens, ISOLATED) != RECIPE.key(TOKENS, ISOLATED)


def test_every_context_has_a_key_of_its_own():
    contexts = [
        ISOLATED,
        ChunkContext.prefix((1, 2)),
        ChunkContext.prefix((1, 2, 3)),
        ChunkContext.neighbours((1, 2), (3,)),
        ChunkContext.neighbours((1, 2), (3, 4)),
        ChunkContext.neighbours((1, 2), (4, 3)),
        ChunkContext.neighbours((1,), (2, 3)),
    ]
    assert len({RECIPE.key(TOKENS, context) for context in contexts}) == len(contexts)


def test_behind_no_neighbour_is_behind_the_prefix():
    assert ChunkContext.neighbours((1, 2), ()) == ChunkContext.prefix((1, 2))


def test_no_field_runs_into_its_neighbour():
    one = dataclasses.replace(RECIPE, tokenizer_id="ab", tenant_salt="c")
    other = dataclasses.replace(RECIPE, tokenizer_id="a", tenant_salt="bc")
    assert one.key(TOKENS, ISOLATED) != other.key(TOKENS, ISOLATED)


def test_another_process_with_another_hash_seed_makes_the_same_key():
    code = (
        "import json, sys; sys.path.append(sys.argv[1])\n"
        "import torch; from kv_samples import CONFIG; from ragkit.kvcache.kv_key import ChunkContext, KVRecipe\n"
        "recipe = KVRecipe('a' * 64, CONFIG, 'tokenizer', torch.bfloat16, 'int4')\n"
        "print(json.dumps(str(recipe.key((1, 2, 3), ChunkContext.prefix((4, 5))))))"
    )
    support = next(path for path in sys.path if path.endswith("support"))
    done = subprocess.run(
        [sys.executable, "-c", code, support],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
        timeout=60,
    )
    assert json.loads(done.stdout) == str(RECIPE.key((1, 2, 3), ChunkContext.prefix((4, 5))))


@pytest.mark.parametrize("digest", ["", "A" * 64, "a" * 63, "../" + "a" * 61, "a" * 64 + "\n"])
def test_only_hex_digests_are_keys(digest):
    with pytest.raises(KVCacheError, match="64 lower-case hex digits"):
        KVKey(digest)
