"""The pooling of a sentence encoder, against pooling by hand."""

import json
import shutil

import pytest
import torch
import transformers

from layershare import make_plan, share
from layershare.errors import ModelError
from layershare.tasks import get_task, pooling
from layershare.tasks.sentence_embedding import embed

EMBEDDING = get_task("sentence-embedding")


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda rows: rows.mean(0)),
        ({"pooling_mode_cls_token": True}, lambda rows: rows[0]),
        ({"pooling_mode_max_tokens": True, "word_embedding_dimension": 16}, lambda rows: rows.max(0).values),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, lambda rows: rows[-1]),
        ({"pooling_mode": "cls"}, lambda rows: rows[0]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean_tokens and max_tokens"),
        (None, "Dense"),
    ],
)
def test_tokens_are_pooled_as_the_folder_of_a_sentence_transformer_says(
    bert_folder, tokenizer, pairs_file, tmp_path, settings, by_hand
):
    folder = shutil.copytree(bert_folder, tmp_path / "model")
    kind = "Dense" if settings is None else "Pooling"
    modules = [("Transformer", ""), (kind, f"1_{kind}"), ("Normalize", "2_Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{name}"} for name, path in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / f"1_{kind}").mkdir()
    (folder / f"1_{kind}" / "config.json").write_text(json.dumps(settings or {}))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = ["the cat sits", "a big red bird sings in the park"]
    if isinstance(by_hand, str):
        with pytest.raises(ModelError, match=by_hand):
            embed(model, tokenizer, texts)
        with pytest.raises(ModelError, match=by_hand):
            EMBEDDING.check(EMBEDDING.read(pairs_file), model.config)
        return
    ours = embed(model, tokenizer, texts)
    copied = embed(share(model, make_plan(model, "adjacent", unique=4)), tokenizer, texts)
    assert torch.equal(ours, copied)  # a student is pooled as its original
    for row, text in zip(ours, texts, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(row, torch.nn.functional.normalize(by_hand(states), dim=-1), atol=1e-6)


def test_a_folder_is_read_once_and_again_when_it_changed(bert_folder, tmp_path, monkeypatch):
    folder, reads = shutil.copytree(bert_folder, tmp_path / "model"), []
    local = pooling._local
    monkeypatch.setattr(pooling, "_local", lambda file: (reads.append(file.name), local(file))[1])
    config = transformers.AutoConfig.from_pretrained(folder)
    assert [pooling.pooling_of(config) for _ in range(3)] == [pooling.mean] * 3
    assert reads == ["modules.json"]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folder / "modules.json").write_text('[{"path": "1_Pooling", "type": "x.Pooling"}]')
    assert pooling.pooling_of(config) is pooling.first
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="model, from which the model was loaded, is gone"):
        pooling.pooling_of(config)
