"""Every option and argument of the command line, with its help text, once. Verbs pick from these."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def _no_models_file(out: Path | None) -> Path | None:
    """Refuse to write over a file of a model, as its weights or config, instead of beside it."""
    if (
        out is not None
        and out.is_file()
        and (out.parent / "config.json").is_file()
        and out.name != "plan.toml"
    ):
        raise typer.BadParameter(f"{out} is a file of the model in {out.parent}. Choose another name.")
    return out


Model = Annotated[str, typer.Argument(help="A model folder or a hub name.")]
Models = Annotated[list[str], typer.Argument(help="Model folders or hub names; the first is the measure.")]
OneText = Annotated[str, typer.Argument(help="A text.")]
OneModel = Annotated[str, typer.Option("--model", help="A model folder or a hub name.")]
TensorsOut = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Also write everything here, as .safetensors.", callback=_no_models_file
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw the attention of every layer and head here, as .svg.", callback=_no_models_file),
]
Folder = Annotated[Path, typer.Argument(help="A model folder.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")]
Task = Annotated[
    str,
    typer.Option(
        help="What the model is for: sentence-embedding, text-classification, token-classification, translation, "
        "summarization, masked-lm, causal-lm, span-corruption, image-classification, image-to-text, "
        "zero-shot-image-classification, object-detection, masked-image-modeling, audio-classification, "
        "speech-recognition or text-to-speech."
    ),
]
TaskSet = Annotated[
    list[str] | None,
    typer.Option("--task-set", help="KEY=VALUE of the task, as num_beams=4 of translation; may be repeated."),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Leave out rows that cannot be read, and tell them, instead of an error."
    ),
]
Data = Annotated[
    list[Path],
    typer.Option(
        help="CSV, TSV, JSONL or Parquet file, a folder of images or sounds, or OWNER/NAME of a data set on the hub; "
        "may be given several times."
    ),
]
Test = Annotated[Path | None, typer.Option(help="File to report on; default: a part of the data, held out.")]
Validation = Annotated[
    Path | None, typer.Option(help="File to choose on; default: a part of the data, held out.")
]
Column = Annotated[
    list[str] | None, typer.Option(help="ROLE=NAME where a column is not found by its usual name.")
]
Budget = Annotated[
    float, typer.Option(help="The most layer parameters to store, as a fraction of the original's.")
]
RunBudget = Annotated[
    float | None,
    typer.Option(help="The most layer parameters to store, as a fraction of the original's; default 0.5."),
]
MaybeBudget = Annotated[
    float | None, typer.Option(help="As a fraction of the layer parameters, instead of --unique.")
]
Scheme = Annotated[
    str,
    typer.Option(
        help="How to share: auto, search (needs optuna), d_rank, drop, gated, basis, geopair, atoms, or a preset."
    ),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan (.toml or .json) instead of a preset.")]
PlanOut = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        help="Save the plan here (.toml or .json); with --data: the folder to write.",
        callback=_no_models_file,
    ),
]
PlanBudget = Annotated[
    float | None,
    typer.Option(
        help="As a fraction of the layer parameters, instead of --unique; with --data also bytes of the whole model."
    ),
]
SearchData = Annotated[
    list[Path] | None,
    typer.Option(
        "--data", help="Search the plan on these texts (see --data of compress); needs --budget and -o."
    ),
]
Trials = Annotated[int, typer.Option(help="Plans to try in a search, presets and auto included.")]
Jobs = Annotated[int, typer.Option(help="Processes that try plans at the same time.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="URL of the database that keeps the trials (any that optuna speaks); default: SQLite in the folder. "
        "The same command on another machine then takes trials too."
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        help="A published scheme: all, sequence, cycle, cycle_rev, middle_cycle, sandwich, adjacent; "
        "or drop, gated, basis, geopair, atoms; or, with --calibration and --budget, auto or d_rank."
    ),
]
Unique = Annotated[int | None, typer.Option(help="Distinct layers per stack.")]
Kept = Annotated[
    int | None,
    typer.Option(
        "--unique", help="With --scheme auto: layers per stack to keep; default as many as is best."
    ),
]
Parts = Annotated[
    str | None, typer.Option(help="Parts to share, with commas: attention,ffn; default all matrices.")
]
StackName = Annotated[str | None, typer.Option("--stack", help="Share only this stack; default all.")]
Merge = Annotated[
    Literal["mean", "first", "last", "stepwise", "regmean"],
    typer.Option(help="How to make one tensor of several."),
]
Rank = Annotated[
    int, typer.Option(help="Rank of a private correction per position; of basis and geopair: of the basis.")
]
KeysValues = Annotated[
    bool, typer.Option("--kv", help="Keys and values of each group come from its first position.")
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(help="Texts to fit the shared tensors on; needs --task; may be given several times."),
]
Samples = Annotated[
    int | None,
    typer.Option(help="How many texts of the calibration; default 256, with --fit sequential 1024.", min=1),
]
Stream = Annotated[
    bool, typer.Option("--stream", help="From file to file, for a checkpoint larger than memory.")
]
Fit = Annotated[
    Literal["inputs", "answer", "sequential"] | None,
    typer.Option(
        help="What factors are fitted to: each map's inputs, the model's answer, or the model shared so far; "
        "default: inputs, for auto answer."
    ),
]
MaybeTask = Annotated[
    str | None, typer.Option("--task", help="What the model is for; how the texts are read.")
]
PruneWhat = Annotated[str, typer.Option("--what", help="positions, heads, neurons or weights.")]
Amount = Annotated[
    float | None,
    typer.Option(help="A fraction below 1, or a number: of each stack, of each block, or of all weights."),
]
PruneBy = Annotated[
    str,
    typer.Option(
        "--by", help="Importance: magnitude, taylor, activation, influence (positions) or wanda (weights)."
    ),
]
Pattern = Annotated[str | None, typer.Option(help="N:M, as 2:4, of single weights instead of an amount.")]
Threshold = Annotated[
    float | None, typer.Option(help="Most energy (sum of squares) that zeroed weights may have together.")
]
KeepShape = Annotated[
    bool, typer.Option("--keep-shape", help="Zero heads or neurons instead of removing them.")
]
PruneData = Annotated[
    list[Path] | None, typer.Option("--data", help="Texts to measure importance on; needs --task.")
]
Guide = Annotated[
    str | None, typer.Option("--teacher", help="For taylor without labels: the original of a shared model.")
]
Teacher = Annotated[str, typer.Option(help="The original model: a folder or a hub name.")]
Method = Annotated[
    Literal["houlsby", "pfeiffer", "lora", "prefix", "ia3"], typer.Option(help="The kind of small modules.")
]
PerGroup = Annotated[
    bool, typer.Option("--per-group", help="One module for all positions that share a weight.")
]
MaybeTeacher = Annotated[
    str | None, typer.Option("--teacher", help="A large model to match, instead of labels.")
]
TeacherCache = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="Keep the teacher's outputs in this folder, for other runs with the same texts."
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(help="Also make a baseline, nearest in size in whole layers and healed alike: drop."),
]
Steps = Annotated[
    int | None, typer.Option(help="Optimizer steps of healing; default: the task's own number.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder that is not empty.")]
DemoOut = Annotated[
    Path | None, typer.Option("-o", "--out", help="The folder to write; default: under out/.")
]
Start = Annotated[
    str,
    typer.Argument(
        help="A model type (bert, gpt2, t5, ...) or a config (.json), for a fresh model; or a checkpoint."
    ),
]
Texts = Annotated[
    list[Path],
    typer.Option("--data", help="Plain text, or a table with a text column; may be given several times."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Whose tokenizer to use; default: the checkpoint's, or one trained on the text."),
]
Objective = Annotated[
    Literal["auto", "masked", "causal", "span"],
    typer.Option(help="What is to be guessed; auto: what suits the model."),
]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block of packed text.")]
Size = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE of a fresh model's config, as hidden_size=128; may be repeated."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the training, as learning_rate=1e-4; may be repeated."),
]
AdaptSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="KEY=VALUE of the training, or adapter.KEY=VALUE, as adapter.rank=4; may be repeated."
    ),
]
PruneSet = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the cut, as protect=[0,5] or scope=row; may be repeated."),
]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe (.yaml).")]
RecipeOut = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="The folder of the run; default: the recipe's own, or out/NAME."),
]
SetStage = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="STAGE.KEY=VALUE, as teacher.steps=50, or KEY=VALUE, as seed=1; may be repeated."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only print what would be done, with predicted sizes and steps.")
]
NewHead = Annotated[
    bool, typer.Option("--new-head", help="Replace the head that the model has, for other labels.")
]
Anew = Annotated[bool, typer.Option("--anew", help="Forget an interrupted run instead of going on with it.")]
TrainSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Optimizer steps; default: the verb's own number.")
]
MaxLoss = Annotated[
    float, typer.Option(help="The most of the metric to lose on the validation texts, as a fraction.")
]
ExitsSet = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the exits, as positions=[1,3] or epochs=10; may be repeated."),
]
ExportFormat = Annotated[str, typer.Option("--format", help="What to write: dense or onnx.")]
Benched = Annotated[
    list[Path], typer.Argument(help="Model folders and ONNX exports; the first is the measure.")
]
Tokens = Annotated[int, typer.Option(help="Tokens of a text, or of a prompt.", min=1)]
NewTokens = Annotated[int, typer.Option("--new", help="Tokens to generate, where a model can.", min=1)]
LargeBatch = Annotated[int, typer.Option("--batch", help="The larger batch; 1 leaves it out.", min=1)]
Threads = Annotated[int | None, typer.Option(help="Compute threads; default: all cores.", min=1)]
BenchOut = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        help="Also write table and charts here (.html), or figures (.json).",
        callback=_no_models_file,
    ),
]
Int8 = Annotated[bool, typer.Option("--int8", help="Quantise weights and activations; with --format onnx.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout; everything else goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]
PageOut = Annotated[Path | None, typer.Option("-o", "--out", help="Also write the table here, as Markdown.")]
Laws = Annotated[
    Path | None, typer.Option(exists=True, help="Results of benchmarks/architectures.py, to be merged in.")
]
