"""The alignment step: its loss is a softmax over titles, it learns, it resumes."""

import pytest
import torch
from torch.nn import functional as F

from userllm.errors import UserError
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.training.alignment import AlignmentConfig, TextAlignment, TitleAlignment, align, title_embeddings
from userllm.training.examples import ExampleBatches
from userllm.training.trainer import OptimizationConfig

FUSIONS = {
    "cross": {},
    "soft": {"kind": "soft_prompt"},
    "perceiver": {"perceiver": PerceiverConfig(latents=3, layers=1, heads=2)},
}


def config_of(**settings):
    quick = OptimizationConfig(learning_rate=1e-2, save_every=4, log_every=1)
    return AlignmentConfig(**({"steps": 12, "histories": 8, "optimization": quick} | settings))


def test_titles_are_means_of_token_embeddings(make_user_llm):
    model = make_user_llm()
    for output, table in ((True, model.lm.get_output_embeddings()), (False, model.lm.get_input_embeddings())):
        mine = title_embeddings(model, "next_item", output)
        for answer, text in enumerate(model.tasks["next_item"].answers):
            prompt = model.tasks["next_item"].config.prompt
            before = len(model.tokenizer(prompt)["input_ids"])
            ids = model.tokenizer(f"{prompt} {text}")["input_ids"][before:]
            tree = model.answers["next_item"].tree
            path = tree.paths[answer][1:]
            assert tree.token[path[path >= 0]].tolist()[: len(ids)] == ids
            rows = table.weight[tree.token[path[path >= 0]]]
            torch.testing.assert_close(mine[answer], rows.mean(0))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loss_is_a_softmax_over_the_catalogue(make_user_llm, dataset, split, stored, fusion):
    model = make_user_llm(**FUSIONS[fusion])
    step, config = TitleAlignment(model, 0.2), config_of()
    examples = ExampleBatches(model, dataset, split, stored, config, seed=0).batch(0)["examples"]
    with torch.no_grad():
        loss = step(examples)["loss"]
        titles = title_embeddings(model, "next_item", output=fusion != "soft")
        titles = titles - titles.mean(0)
        total, count = 0.0, 0
        for row, end, task, answer in zip(
            examples.rows, examples.ends, examples.task, examples.answers, strict=True
        ):
            if examples.tasks[task] != "next_item":
                continue
            users = model.context(examples.histories.select(row[None]), ends=end[None])
            shown = step._shown(users.tokens, users.mask)[0]
            log_p = torch.log_softmax(F.cosine_similarity(shown[None], titles) / 0.2, 0)
            total, count = total - float(log_p[answer]), count + 1
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


def test_soft_prompts_are_compared_with_their_own_events_words(make_user_llm, dataset, split, stored):
    model = make_user_llm(kind="soft_prompt")
    step, config = TextAlignment(model, " {title} ({genres});"), config_of()
    examples = ExampleBatches(model, dataset, split, stored, config, seed=0).batch(0)["examples"]
    table = model.lm.get_input_embeddings().weight
    shown, meant = [], []
    with torch.no_grad():
        loss = step(examples)["loss"]
        for row, end in zip(examples.rows.tolist(), examples.ends.tolist(), strict=True):
            users = model.context(examples.histories.select(torch.tensor([row])), ends=torch.tensor([end]))
            shown.append(model.soft_prompt.project(users.tokens[users.mask]))
            for place in range(max(0, end - model.window), end):
                item = int(examples.histories.fields["item"][row, place])
                genres = [int(g) for g in examples.histories.fields["genres"][row, place] if g > 0]
                title = step.words.values["title"][item]
                text = f" {title} ({', '.join(step.words.values['genres'][g] for g in genres)});"
                ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
                meant.append(table[torch.tensor(ids)].mean(0))
    shown, meant = torch.cat(shown), torch.stack(meant)
    assert float(loss) == pytest.approx(float(F.mse_loss(shown, meant) / meant.square().mean()), rel=1e-4)


def test_prompts_learn_to_be_read(make_user_llm, dataset, split, stored, tmp_path):
    model = make_user_llm(kind="soft_prompt", stir=False)
    config = config_of(to="own_text", steps=40)
    losses = [
        e["alignment"] for e in align(model, dataset, split, stored, config, tmp_path, 0) if "alignment" in e
    ]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("fusion", ["cross", "perceiver"])
def test_own_text_needs_a_soft_prompt_per_event(make_user_llm, fusion):
    with pytest.raises(UserError, match="a soft prompt per event"):
        TextAlignment(make_user_llm(**FUSIONS[fusion]), " {title}")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_learns_and_is_done_once(make_user_llm, dataset, split, stored, tmp_path, fusion):
    model = make_user_llm(stir=False, **FUSIONS[fusion])
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    history = align(model, dataset, split, stored, config_of(steps=40), tmp_path / "a", 0)
    losses = [entry["alignment"] for entry in history if "alignment" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    changed = {name for name, weight in model.named_parameters() if not torch.equal(before[name], weight)}
    assert changed and not any(name.startswith("lm.") and ".user_block." not in name for name in changed)
    trained = ("soft_prompt.project.",) if fusion == "soft" else (".user_block.value.", ".user_block.out.")
    assert all(any(part in name for name in changed) for part in trained)
    again = make_user_llm(stir=False, **FUSIONS[fusion])
    assert align(again, dataset, split, stored, config_of(steps=40), tmp_path / "a", 0) == []
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_it_resumes(make_user_llm, dataset, split, stored, tmp_path, interrupted):
    def run(folder):
        torch.manual_seed(0)
        model = make_user_llm(stir=False)
        align(model, dataset, split, stored, config_of(), folder, 0)
        return model

    whole = run(tmp_path / "whole")
    with interrupted(8):
        run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    for (name, weight), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_it_comes_before_contextualization(run_contextualize, tmp_path):
    model, before, _ = run_contextualize(tmp_path / "c", "proj", alignment=config_of(steps=4))
    assert (tmp_path / "c" / "alignment" / "aligned.safetensors").exists()
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items() if n.startswith("encoder."))


def test_it_needs_user_tokens(make_user_llm):
    with pytest.raises(UserError, match="no user tokens to align"):
        TitleAlignment(make_user_llm("lora", kind="none", text=HistoryTextConfig(events=2)), 1.0)
