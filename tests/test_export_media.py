"""ONNX graphs of models that see and hear: what PyTorch says, every weight once, the processor beside them."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import torch
import transformers
from transformers import AutoConfig, AutoProcessor

import materials
from layershare import make_plan, share
from layershare.errors import ModelError, OptionError
from layershare.export import export
from layershare.export.onnx import _told
from layershare.measure.subject import open_subject
from layershare.onnx import load
from layershare.onnx.sources import source
from layershare.store.open import load_model


@pytest.fixture
def shared(tmp_path, tokenizer):
    """``shared(materials.whisper)``: the model in a folder with its processor, all layers of a stack tied."""

    def make(maker, **said):
        maker(tmp_path / "made", tokenizer)
        made = load_model(tmp_path / "made")
        made = share(made, make_plan(made, "all"))
        if said:
            made.generation_config = transformers.GenerationConfig(**said)
        made.save_pretrained(tmp_path / "made")
        return made.eval(), tmp_path / "made"

    return make


def sounds(rate=16000, lengths=(3000, 5000)):
    draw = np.random.default_rng(0)
    return [draw.standard_normal(length).astype(np.float32) for length in lengths]


def stored_once(made):
    assert made.bytes_stored <= 1.02 * made.bytes_unique + 4096  # constants of a tiny graph
    assert made.shared > made.products / 2
    assert made.difference <= 1e-4 * made.scale


def can_be_timed(folder, out, *, generates):
    """As ``layershare bench`` does it."""
    one, other = open_subject(folder), open_subject(out)
    inputs = one.inputs(2, 12)
    assert all((array == other.inputs(2, 12)[name]).all() for name, array in inputs.items())
    for subject in (one, other):
        subject.run(inputs)
        if subject.generate is not None:
            subject.generate(inputs, 3)
    assert generates == (one.generate is not None) == (other.generate is not None)


def test_a_model_that_hears_answers_to_padded_sounds(shared, tmp_path):
    model, folder = shared(materials.wav2vec2_ctc)
    made = export(folder, tmp_path / "out", "onnx")
    assert made.kind == "sound"
    stored_once(made)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    read = processor(sounds(), sampling_rate=16000, padding=True, return_tensors="np")
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(array) for name, array in read.items()}).logits.numpy()
    assert np.allclose(load(tmp_path / "out")(**read)["logits"], wanted, atol=1e-5)
    can_be_timed(folder, tmp_path / "out", generates=False)


def test_whisper_writes_as_its_own_generate_does(shared, tmp_path):
    model, folder = shared(
        materials.whisper, suppress_tokens=[12, 8], begin_suppress_tokens=[9], no_timestamps_token_id=12,
        is_multilingual=False, return_timestamps=False, decoder_start_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made = export(folder, tmp_path / "out", "onnx")
    assert made.kind == "encoder-decoder"
    stored_once(made)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    read = processor(sounds(), sampling_rate=16000, return_tensors="np")
    wanted = model.generate(torch.from_numpy(read["input_features"]), max_new_tokens=9)
    runner = load(tmp_path / "out")
    found = runner.generate_ids(read, max_new_tokens=9)
    assert found.tolist() == wanted[:, -9:].tolist()
    assert not {12, 8} & set(found.ravel().tolist())
    assert runner.start == [2, 12]
    other = runner.generate_ids(read, start=[2, 5, 6], max_new_tokens=9)
    assert other.tolist() != found.tolist()
    can_be_timed(folder, tmp_path / "out", generates=True)


def test_whisper_is_told_the_language_of_its_config():
    settings = transformers.GenerationConfig(
        is_multilingual=True, lang_to_id={"<|de|>": 70}, task_to_id={"transcribe": 80, "translate": 81},
        no_timestamps_token_id=90,
    )  # fmt: skip
    assert _told(settings) == ([80, 90], [70])
    for language in ("de", "german", "<|de|>"):
        settings.language = language
        assert _told(settings) == ([70, 80, 90], [])
    settings.task, settings.return_timestamps = "translate", True
    assert _told(settings) == ([70, 81], [])


def attentive(path, tokenizer):
    """A random Whisper whose decoder listens."""
    materials.whisper(path, tokenizer)
    model = load_model(path)
    for layer in model.model.decoder.layers:
        for part in layer.encoder_attn.children():
            part.weight.data *= 30
    for part in (model.model.encoder.conv1, model.model.encoder.conv2):
        part.weight.data *= 30
    model.save_pretrained(path)


def test_whisper_finds_the_language_of_each_recording(shared, tmp_path):
    languages = {f"<|{name}|>": 10 + i for i, name in enumerate(("en", "de", "fr", "it"))}
    model, folder = shared(
        attentive, is_multilingual=True, lang_to_id=languages, task_to_id={"transcribe": 14, "translate": 15},
        no_timestamps_token_id=16, return_timestamps=False, decoder_start_token_id=2, pad_token_id=0,
        suppress_tokens=[3],
    )  # fmt: skip
    export(folder, tmp_path / "out", "onnx")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    heard = [np.sin(np.arange(16000) * pitch).astype(np.float32) for pitch in (0, 0.01, 0.1, 0.3, 1, 2)]
    read = processor(heard, sampling_rate=16000, return_tensors="np")
    features = torch.from_numpy(read["input_features"])
    assert len(set(model.detect_language(features).tolist())) > 1
    wanted = model.generate(features, max_new_tokens=9)
    found = load(tmp_path / "out").generate_ids(read, max_new_tokens=9)
    assert found.tolist() == wanted[:, :9].tolist()  # it goes on with more pieces


def test_int8_of_whisper_counts_every_product(shared, tmp_path):
    _, folder = shared(materials.whisper)
    made = export(folder, tmp_path / "out", "onnx", int8=True)
    assert made.quantized == made.products > made.shared > 0


def captioner(path, tokenizer):
    torch.manual_seed(0)
    eye = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )  # fmt: skip
    tongue = transformers.GPT2Config(n_embd=24, n_layer=4, n_head=2, vocab_size=40, add_cross_attention=True)
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(eye, add_pooling_layer=False), decoder=transformers.GPT2LMHeadModel(tongue)
    )  # fmt: skip
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)


def test_an_image_is_written_about(shared, tmp_path):
    model, folder = shared(captioner)
    made = export(folder, tmp_path / "out", "onnx")
    assert made.kind == "encoder-decoder"
    stored_once(made)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model.generation_config.eos_token_id = None
    wanted = model.generate(pixels, max_new_tokens=6)
    runner = load(tmp_path / "out")
    runner.eos = []
    assert (
        runner.generate_ids({"pixel_values": pixels.numpy()}, max_new_tokens=6).tolist()
        == wanted[:, -6:].tolist()
    )
    can_be_timed(folder, tmp_path / "out", generates=True)


def detector(path, tokenizer):
    torch.manual_seed(0)
    transformers.YolosForObjectDetection(
        transformers.YolosConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=[32, 48],
            patch_size=8, num_detection_tokens=5,
        )
    ).save_pretrained(path)  # fmt: skip


def test_a_detector_keeps_its_boxes(shared, tmp_path):
    model, folder = shared(detector)
    made = export(folder, tmp_path / "out", "onnx")
    assert made.kind == "vision"
    stored_once(made)
    pixels = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found = load(tmp_path / "out")(pixel_values=pixels.numpy())
    with torch.no_grad():
        wanted = model(pixels)
    for name in ("logits", "pred_boxes"):
        assert np.allclose(found[name], wanted[name].numpy(), atol=1e-5)


def spectrogram_reader(path, tokenizer):
    torch.manual_seed(0)
    transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_length=48,
            num_mel_bins=32,
        )
    ).save_pretrained(path)  # fmt: skip


def test_a_model_of_spectrograms_answers_alike(shared, tmp_path):
    model, folder = shared(spectrogram_reader)
    made = export(folder, tmp_path / "out", "onnx")
    assert made.kind == "sound"
    stored_once(made)
    heard = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(heard).logits.numpy()
    assert np.allclose(load(tmp_path / "out")(input_values=heard.numpy())["logits"], wanted, atol=1e-5)
    can_be_timed(folder, tmp_path / "out", generates=False)


def test_shapes_are_those_of_the_config():
    spectrum = AutoConfig.for_model("audio-spectrogram-transformer", max_length=50, num_mel_bins=8).to_dict()
    assert source(spectrum, "input_values", 2, 12).shape == (2, 50, 8)
    wave = AutoConfig.for_model("wav2vec2").to_dict()
    assert source(wave, "input_values", 2, 12).shape == (2, 400 + 11 * 320)
    with pytest.raises(ModelError, match="image_size"):
        source({"num_channels": 3}, "pixel_values", 1, 1)


def clip(path, tokenizer):
    torch.manual_seed(0)
    tower = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    ends = dict(pad_token_id=0, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id)
    config = transformers.CLIPConfig(
        text_config=tower | ends | dict(vocab_size=len(tokenizer), max_position_embeddings=12),
        vision_config=tower | dict(image_size=16, patch_size=8), projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def siglip(path, tokenizer):
    torch.manual_seed(0)
    tower = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    config = transformers.SiglipConfig(
        text_config=tower | dict(vocab_size=len(tokenizer), max_position_embeddings=12, projection_size=16),
        vision_config=tower | dict(image_size=16, patch_size=8),
    )
    model = transformers.SiglipModel(config)
    model.logit_bias.data.fill_(-2.0)
    model.save_pretrained(path)
    names = {"model_input_names": ["input_ids"]}  # as of SigLIP's own tokenizer
    type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", **names).save_pretrained(
        path
    )


@pytest.mark.parametrize("maker", [clip, siglip])
def test_texts_and_images_meet_as_in_pytorch(maker, shared, tokenizer, tmp_path):
    model, folder = shared(maker)
    made = export(folder, tmp_path / "out", "onnx")
    assert made.kind == "dual-encoder"
    stored_once(made)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    texts = ["the cat sits on the mat", "a dog"]
    padding = {"padding": "max_length", "max_length": 12} if maker is siglip else {"padding": True}
    tokens = tokenizer(texts, return_tensors="pt", **padding)
    names = ["input_ids"] if maker is siglip else ["input_ids", "attention_mask"]
    with torch.no_grad():
        wanted = model(pixel_values=pixels, **{name: tokens[name] for name in names})
    runner = load(tmp_path / "out")
    assert np.allclose(runner.encode(texts), wanted.text_embeds.numpy(), atol=1e-5)
    assert np.allclose(
        runner.encode_images({"pixel_values": pixels.numpy()}), wanted.image_embeds.numpy(), atol=1e-5
    )
    logits = runner.match({"pixel_values": pixels.numpy()}, texts)
    assert np.allclose(logits, wanted.logits_per_image.numpy(), atol=1e-4)
    can_be_timed(folder, tmp_path / "out", generates=False)
    quantised = export(folder, tmp_path / "int8", "onnx", int8=True)
    assert quantised.quantized == quantised.products
    with pytest.raises(OptionError, match="labels"):
        runner.classify(texts)


def test_a_model_of_one_tower_embeds_no_images(shared, tmp_path):
    _, folder = shared(detector)
    export(folder, tmp_path / "out", "onnx")
    with pytest.raises(OptionError, match="embeds no images"):
        load(tmp_path / "out").encode_images({"pixel_values": np.zeros((1, 3, 32, 48), np.float32)})
