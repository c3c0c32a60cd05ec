from pathlib import Path

import pytest
import yaml

from hf_csm.config import Replay, RunConfig, Source
from hf_csm.config_parser import dump_run_config, parse_run_config
from hf_csm.errors import UserError


GUIDE = Path("recipes/configs/expressive_finetuning.yaml")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_yaml_is_valid(path):
    assert isinstance(parse_run_config(["--config", str(path)]), RunConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_yaml_is_valid(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert len(path.read_text().splitlines()) <= 10


def test_the_guide_yaml_holds_the_guides_values():
    config = parse_run_config(["--config", str(ROOT / GUIDE)])
    assert config.moshi_paths.hf_repo_id == "kyutai/moshiko-pytorch-bf16"
    assert (config.lora.rank, config.lora.alpha) == (128, 256)
    assert config.optimizer.lr == 4e-6
    assert (config.dataset.duration_sec, config.dataset.batch_size) == (80, 8)
    assert (config.training.max_steps, config.training.save_every, config.training.eval_every) == (3000, 500, 100)


def test_the_guide_yaml_mixes_four_corpora():
    config = parse_run_config(["--config", str(ROOT / GUIDE)]).dataset
    assert [Path(source.path).name for source in config.sources] == ["ravdess", "crema_d", "esd", "msp_podcast"]
    assert config.balance.by == ["corpus", "emotion"]


def test_a_source_may_name_a_revision():
    config = parse_run_config(["--dataset.sources", '[{"path": "user/ravdess", "revision": "v1"}]'])
    assert config.dataset.training_sources() == [Source("user/ravdess", 1.0, "v1")]


def test_the_guides_own_keys_are_valid(tmp_path):
    text = """
moshi_paths: {hf_repo_id: kyutai/moshiko-pytorch-bf16}
dataset: {manifest_path: data/train.jsonl, val_manifest_path: data/val.jsonl, duration_sec: 80, batch_size: 8}
lora: {enable: true, rank: 128, alpha: 256, scaling: 2.0, target_modules: [q_proj, v_proj]}
training: {max_steps: 3000, save_every: 500, eval_every: 100}
optimizer: {name: adamw, lr: 4e-6, weight_decay: 0.01}
scheduler: {num_warmup_steps: 100}
advanced: {gradient_checkpointing: true}
"""
    (tmp_path / "guide.yaml").write_text(text)
    config = parse_run_config(["--config", str(tmp_path / "guide.yaml")])
    assert config.dataset.val_manifest_path == "data/val.jsonl"
    assert config.advanced.gradient_checkpointing is True
    assert config.optimizer.lr == 4e-6


def test_the_guides_keys_that_leave_no_choice_are_no_options_of_the_run(tmp_path):
    arguments = ["--lora.enable", "true", "--lora.scaling=2", "--optimizer.name", "adamw"]
    assert parse_run_config(arguments) == parse_run_config([])
    assert not {"enable", "scaling", "name"} & {*vars(RunConfig().lora), *vars(RunConfig().optimizer)}
    with pytest.raises(UserError, match="lora.scaling is 2"):
        parse_run_config([*arguments, "--lora.rank", "64"])


def test_a_config_yaml_written_with_those_keys_still_loads(tmp_path):
    tree = yaml.safe_load(dump_run_config(RunConfig()))
    tree["lora"] |= {"enable": True, "scaling": None}
    tree["optimizer"]["name"] = "adamw"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert parse_run_config(["--config", str(tmp_path / "config.yaml")]) == RunConfig()


def test_the_command_line_overrides_the_yaml():
    config = parse_run_config(["--config", str(ROOT / GUIDE), "--lora.rank", "64", "--resume-from-checkpoint=latest"])
    assert config.lora.rank == 64
    assert config.lora.alpha == 256
    assert config.resume_from_checkpoint == "latest"


@pytest.mark.parametrize(
    ("arguments", "replay"),
    [
        ([], Replay("data/dialogues.jsonl", 0.1)),
        (["--dataset.replay.fraction", "0.3"], Replay("data/dialogues.jsonl", 0.3)),
        (["--dataset.replay", "null"], None),
    ],
)
def test_replay_is_overridden_like_any_option(tmp_path, arguments, replay):
    (tmp_path / "run.yaml").write_text("dataset: {replay: {manifest_path: data/dialogues.jsonl, fraction: 0.1}}")
    assert parse_run_config(["--config", str(tmp_path / "run.yaml"), *arguments]).dataset.replay == replay


def test_dump_reads_back_the_same(tmp_path):
    options = {
        "dataset.sources": '[{"path": "a", "weight": 2, "revision": "v1"}, {"path": "user/b"}]',
        "dataset.replay": '{"manifest_path": "c.jsonl", "fraction": 0.25}',
        "dataset.balance.by": "[speaker, emotion]",
        "dataset.languages": "[en]",
        "optimizer.betas": "[0.8, 0.9]",
    }
    config = parse_run_config([part for name, value in options.items() for part in (f"--{name}", value)])
    (tmp_path / "config.yaml").write_text(dump_run_config(config))
    assert parse_run_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("yaml_text", "named", "remedy"),
    [
        ("lora: {rnk: 8}", "lora.rnk", "lora.rank"),
        ("traning: {max_steps: 8}", "traning", "training"),
        ("rank: 8", "rank", "lora.rank"),
        ("lora: {rank: eight}", "lora.rank", "--help"),
        ("lora: {rank: 8, alpha: 16, scaling: 1.0}", "lora.scaling is 1", "agree"),
        ("lora: {rank: 8, alpha: 16, scaling: .nan}", "lora.scaling is nan", "agree"),
        ("lora: {enable: false}", "lora.enable is false", "true"),
        ("lora: {enable: maybe}", "lora.enable", "--help"),
        ("optimizer: {name: sgd}", "optimizer.name", "--help"),
        ("dataset: {sources: [{pth: a}]}", "pth", "--help"),
        ("dataset: {control: loud}", "dataset.control", "--help"),
        ("dataset: {balance: {by: []}}", "dataset.balance.by is []", "corpus, emotion"),
        ("dataset: {balance: {by: [emotion, emotion]}}", "['emotion', 'emotion']", "corpus, emotion"),
        ("dataset: {balance: {by: [hue]}}", "hue", "--help"),
        ("dataset: {replay: {manifest_path: a, fraction: 1}}", "dataset.replay.fraction is 1", "below 1"),
        ("dataset: {replay: {manifest_path: a, fractoin: 0.1}}", "replay.fractoin", "replay.fraction?"),
        ("dataset: {replay: {fraction: 0.1}}", "manifest_path", "--help"),
        (
            "dataset: {replay: {manifest_path: '', fraction: 0.1}}",
            "dataset.replay.manifest_path is empty",
            "Name a table",
        ),
        ("dataset: {speakers: []}", "dataset.speakers is empty", "null"),
        ("dataset: {sources: [{path: a, weight: 0}]}", "dataset.sources.weight is 0", "above 0"),
        ("training: {max_steps: 0}", "training.max_steps is 0", "at least 1"),
        ("training: {trackers: [mlflow]}", "mlflow", "tensorboard"),
        ("dataset: {prefix_template: happy}", "'happy'", "{emotion}"),
        ("dataset: {prefix_template: '{emotion}{x}'}", "{x}", "no other braces"),
        ("dataset: {prefix_dropout: 1.5}", "dataset.prefix_dropout is 1.5", "0 to 1"),
        ("lora: {alpha: 0}", "lora.alpha is 0", "above 0"),
        ("lora: {dropout: 1.5}", "lora.dropout is 1.5", "below 1"),
        ("loss: {text_weight: -1}", "loss.text_weight is -1", "at least 0"),
        ("training: {max_grad_norm: -1}", "training.max_grad_norm is -1", "at least 0"),
        ("training: {keep_checkpoints: -1}", "training.keep_checkpoints is -1", "at least 0"),
        ("training: {eval_windows: 0}", "training.eval_windows is 0", "at least 1"),
        ("optimizer: {betas: [2, 3]}", "optimizer.betas is 2", "below 1"),
        ("optimizer: {weight_decay: -1}", "optimizer.weight_decay is -1", "at least 0"),
        ("optimizer: {lr: .nan}", "optimizer.lr is nan", "above 0"),
        ("scheduler: {min_lr_ratio: 2}", "scheduler.min_lr_ratio is 2", "0 to 1"),
        ("seed: -1", "seed is -1", "at least 0"),
        ("optimizer: {lr: .inf}", "optimizer.lr is inf", "above 0"),
        ("dataset: {sources: [{path: a, weight: .inf}]}", "dataset.sources.weight is inf", "above 0"),
        ("dataset: {balance: {max_repeats: .inf}}", "dataset.balance.max_repeats is inf", "at least 1"),
        ("dataset: {balance: {temperature: 1.5}}", "dataset.balance.temperature is 1.5", "0 to 1"),
        ("dataset: {duration_sec: 0.5}", "dataset.duration_sec is 0.5", "at least 1"),
        ("training: 7", "training: 7", "under training"),
        ("training:", "training: None", "under training"),
        ("lora: [1]", "lora: [1]", "under lora"),
        ("dataset: 3", "dataset: 3", "under dataset"),
        ("dataset: {replay: 3}", "dataset.replay: 3", "under dataset.replay"),
        ("lora: [", "not YAML", "line"),
        ("just words", "no options", "key: value"),
    ],
)
def test_a_bad_option_is_named_with_its_remedy(tmp_path, yaml_text, named, remedy):
    (tmp_path / "bad.yaml").write_text(yaml_text)
    with pytest.raises(UserError) as caught:
        parse_run_config(["--config", str(tmp_path / "bad.yaml")])
    assert named in caught.value.problem
    assert remedy in caught.value.remedy
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize("argument", ["--lora.rnk=3", "--lora.rnk"])
def test_a_bad_option_on_the_command_line_names_the_nearest(argument):
    with pytest.raises(UserError, match=r"lora.rnk.*\n.*lora.rank"):
        parse_run_config([argument, "3"])


def test_a_missing_configuration_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        parse_run_config(["--config", "nowhere.yaml"])


def test_a_run_without_data_is_an_error():
    with pytest.raises(UserError, match="No training data"):
        parse_run_config([]).dataset.training_sources()


def test_manifest_path_and_sources_exclude_each_other():
    with pytest.raises(UserError, match="both given"):
        parse_run_config(["--dataset.manifest_path", "a", "--dataset.sources", '[{"path": "b"}]'])


def test_help_shows_the_text_under_a_field(capsys):
    with pytest.raises(SystemExit):
        parse_run_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 draws emotions as recorded, 0 draws them equally often." in shown
