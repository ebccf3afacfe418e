"""The emitted module beside the live model: outputs, losses, training, casts, generation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as T
from torch import nn

from surgery.core.diagnostics import SurgeryError
from surgery.model import losses
from surgery.model.capture import capture_module
from surgery.model.program import ModelInfo
from surgery.model.realise import held
from surgery.model.runtime import GraphBlock, build_module
from surgery.model.weights import Weights
from surgery.opening import assemble
from tests.programs import LM, TEXT, ids, live, module_for, padded, program_for


@pytest.fixture(scope="module")
def bert():
    model = live(T.BertModel, T.BertConfig(**TEXT))
    return model, module_for(model)


@pytest.fixture(scope="module")
def llama():
    model = live(T.LlamaForCausalLM, T.LlamaConfig(num_key_value_heads=2, **LM, **TEXT))
    return model, module_for(model)


@pytest.fixture(scope="module")
def gpt2():
    model = live(T.GPT2LMHeadModel, T.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, **LM))
    return model, module_for(model)


def code(error) -> str:
    return error.value.diagnostics[0].code


# --- calls ----------------------------------------------------------------------------------------------------------------------


def test_outputs_are_equal_and_of_the_original_class(bert):
    model, module = bert
    tokens, mask = padded(3, 17)
    with torch.no_grad():
        want, got = model(tokens, attention_mask=mask), module(tokens, attention_mask=mask)
    assert type(got) is type(want) and list(got) == list(want)
    assert torch.equal(want.last_hidden_state, got.last_hidden_state) and torch.equal(want.pooler_output, got.pooler_output)


def test_missing_inputs_get_the_defaults_of_the_live_model(bert):
    model, module = bert
    tokens = ids(2, 9)
    with torch.no_grad():
        assert torch.allclose(model(tokens).last_hidden_state, module(tokens).last_hidden_state, atol=1e-5)
        types = torch.ones_like(tokens)
        want = model(tokens, torch.ones_like(tokens), types).last_hidden_state
        assert torch.equal(want, module(tokens, torch.ones_like(tokens), types).last_hidden_state)


def test_return_dict_false_gives_a_tuple(bert):
    model, module = bert
    got = module(ids(2, 5), return_dict=False)
    assert isinstance(got, tuple) and len(got) == len(model(ids(2, 5), return_dict=False))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"output_attentions": True}, "BertModel was captured without output_attentions"),
        ({"output_hidden_states": True}, "without output_hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "without inputs_embeds"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, "input_ids twice"),
    ],
)
def test_what_was_not_captured_is_refused(bert, kwargs, match):
    with pytest.raises(SurgeryError, match=match) as error:
        bert[1](ids(1, 2), **kwargs)
    assert code(error) == "S0831"


def test_a_call_without_input_is_explained(bert):
    with pytest.raises(SurgeryError, match="the input input_ids is missing") as error:
        bert[1](attention_mask=torch.ones(1, 2, dtype=torch.long))
    assert code(error) == "S0831"


def test_the_vocabulary_cannot_be_resized(bert):
    assert bert[1].resize_token_embeddings(99).num_embeddings == 99
    with pytest.raises(SurgeryError, match="the vocabulary of a captured model cannot change") as error:
        bert[1].resize_token_embeddings(120)
    assert code(error) == "S0832"


def test_names_are_the_original_ones(bert, gpt2):
    for model, module in (bert, gpt2):
        assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
        assert set(module.state_dict()) == set(model.state_dict())
        assert module.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    assert gpt2[1].lm_head.weight is gpt2[1].transformer.wte.weight


# --- dtype and device -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["bert", "llama"])
def test_casts_follow_the_live_model(which, request):
    model, module = (copy.deepcopy(m) for m in request.getfixturevalue(which))
    tokens, mask = padded(2, 11)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model, module = model.to(dtype), module.to(dtype)
        with torch.no_grad():
            want, got = model(tokens, attention_mask=mask)[0], module(tokens, attention_mask=mask)[0]
        assert got.dtype == dtype and torch.allclose(
            want.float(), got.float(), atol={torch.float16: 2e-2, torch.float64: 1e-4}.get(dtype, 0.0), rtol=0
        )


def test_half_and_meta_moves_retarget_every_block(bert):
    module = copy.deepcopy(bert[1]).half()
    blocks = [m for m in module.modules() if isinstance(m, GraphBlock)]
    assert len(blocks) == 3 and module.dtype == torch.float16
    assert module.to("meta")(ids(2, 5).to("meta")).last_hidden_state.device.type == "meta"


def test_autocast_equals_the_live_model(bert):
    model, module = bert
    tokens, mask = padded(2, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(tokens, mask).last_hidden_state, module(tokens, mask).last_hidden_state)


# --- losses -----------------------------------------------------------------------------------------------------------------------

HEADS = [
    (T.BertForMaskedLM, T.BertConfig, {}, lambda t: {"labels": t.masked_fill(t % 2 == 0, -100)}),
    (T.BertForSequenceClassification, T.BertConfig, {"num_labels": 3}, lambda t: {"labels": torch.tensor([0, 2])}),
    (T.BertForSequenceClassification, T.BertConfig, {"num_labels": 1}, lambda t: {"labels": torch.tensor([0.5, -2.0])}),
    (T.BertForSequenceClassification, T.BertConfig, {"num_labels": 3}, lambda t: {"labels": torch.tensor([[0.0, 1, 1], [1, 0, 0]])}),
    (T.BertForTokenClassification, T.BertConfig, {"num_labels": 4}, lambda t: {"labels": t % 4}),
    (T.BertForQuestionAnswering, T.BertConfig, {}, lambda t: {"start_positions": torch.tensor([1, 50]), "end_positions": torch.tensor([3, 4])}),
    (T.LlamaForCausalLM, T.LlamaConfig, {"num_key_value_heads": 2, **LM}, lambda t: {"labels": t}),
    (T.LlamaForCausalLM, T.LlamaConfig, {"num_key_value_heads": 2, **LM}, lambda t: {"labels": t, "num_items_in_batch": 7}),
    (T.LlamaForSequenceClassification, T.LlamaConfig, {"num_labels": 3, **LM}, lambda t: {"labels": torch.tensor([2, 1])}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "config", "more", "labels"), HEADS, ids=lambda v: getattr(v, "__name__", ""))
def test_losses_equal_the_live_models(cls, config, more, labels):
    model = live(cls, config(**TEXT, **more))
    module = module_for(model)
    tokens, mask = padded(2, 12)
    given = labels(tokens)
    want, got = model(tokens, attention_mask=mask, **given), module(tokens, attention_mask=mask, **given)
    assert torch.equal(want.loss, got.loss) and list(want) == list(got)
    got.loss.backward()
    want.loss.backward()
    for (name, p), q in zip(
        model.named_parameters(), (dict(module.named_parameters())[n] for n, _ in model.named_parameters()), strict=True
    ):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6)), name


def test_seq2seq_labels_give_decoder_inputs():
    config = T.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0
    )
    model = live(T.T5ForConditionalGeneration, config, scale=1.0)
    module = module_for(model)
    tokens, mask = padded(2, 12)
    labels = ids(2, 7, seed=3)
    labels[1, 5:] = -100
    want, got = model(tokens, attention_mask=mask, labels=labels, use_cache=False), module(tokens, attention_mask=mask, labels=labels)
    assert torch.allclose(want.loss, got.loss, atol=1e-6)
    assert losses.shift_right(labels, config).tolist() == model._shift_right(labels).tolist()


def test_labels_of_an_unknown_head_are_refused(bert):
    with pytest.raises(SurgeryError, match="BertModel was captured without labels"):
        bert[1](ids(1, 3), labels=ids(1, 3))


# --- training ---------------------------------------------------------------------------------------------------------------------


def test_training_mode_draws_the_same_dropout():
    model = live(T.BertForMaskedLM, T.BertConfig(**TEXT))
    module = module_for(model)
    model.train(), module.train()
    tokens, mask = padded(2, 12)
    torch.manual_seed(7)
    want = model(tokens, attention_mask=mask, labels=tokens)
    torch.manual_seed(7)
    got = module(tokens, attention_mask=mask, labels=tokens)
    assert torch.equal(want.loss, got.loss)
    assert not torch.equal(module(tokens).logits, module(tokens).logits)


def test_gradient_checkpointing_per_layer_changes_no_gradient(llama):
    module = copy.deepcopy(llama[1]).train()
    tokens, mask = padded(2, 12)

    def gradients(count_saved: bool = True):
        module.zero_grad()
        saved = 0

        def pack(t):
            nonlocal saved
            saved += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = module(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        loss.backward()
        return saved, {n: p.grad.clone() for n, p in module.named_parameters()}

    plain, before = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.gradient_checkpointing_enable()
    assert all(b.gradient_checkpointing for b in module.modules() if isinstance(b, GraphBlock))
    less, after = gradients()
    assert less < plain / 2 and all(torch.equal(before[n], after[n]) for n in before)
    module.gradient_checkpointing_disable()
    assert gradients()[0] == plain


def test_a_copy_is_independent(bert):
    module = bert[1]
    twin = copy.deepcopy(module)
    tokens = ids(2, 6)
    before = module(tokens).last_hidden_state
    with torch.no_grad():
        twin.get_input_embeddings().weight.mul_(2)
    assert torch.equal(module(tokens).last_hidden_state, before) and not torch.equal(twin(tokens).last_hidden_state, before)


def test_frozen_parameters_do_not_require_gradients():
    model = live(T.BertModel, T.BertConfig(**TEXT))
    program = program_for(model)
    program.frozen = {n for n in program.weights if ".0." in n}
    module = build_module(program, {n: e.tensor for n, e in program.weights.items()})
    assert {n for n, p in module.named_parameters() if not p.requires_grad} == {n for n, _ in model.named_parameters() if ".0." in n}


def test_missing_and_misshapen_tensors_are_named():
    program = program_for(live(T.BertModel, T.BertConfig(**TEXT)))
    tensors = {n: e.tensor for n, e in program.weights.items()}
    with pytest.raises(SurgeryError, match=r"there is no tensor for pooler\.dense\.bias") as error:
        build_module(program, {k: v for k, v in tensors.items() if k != "pooler.dense.bias"})
    assert code(error) == "S0833"
    with pytest.raises(SurgeryError, match=r"pooler.dense.bias has the shape \[3\], the graph needs \[32\]"):
        build_module(program, {**tensors, "pooler.dense.bias": torch.zeros(3)})


# --- generation -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}], ids=str)
def test_generation_is_token_identical(which, options, request):
    model, module = request.getfixturevalue(which)
    tokens, mask = padded(3, 9, left=True)
    settings = dict(attention_mask=mask, max_new_tokens=10, do_sample=False, **options)
    assert torch.equal(model.generate(tokens, **settings), module.generate(tokens, **settings))


def test_a_cache_goes_in_and_out(llama):
    model, module = llama
    tokens = ids(2, 8)
    with torch.no_grad():
        first = module(tokens[:, :5], use_cache=True)
        assert type(first.past_key_values) is T.DynamicCache and first.past_key_values.get_seq_length() == 5
        cache = first.past_key_values
        second = module(tokens[:, 5:], past_key_values=cache)
        assert second.past_key_values is cache and cache.get_seq_length() == 8
        assert torch.allclose(second.logits, model(tokens).logits[:, 5:], atol=1e-4)
    assert module(tokens, use_cache=False).past_key_values is None


def test_a_cache_of_another_kind_is_refused(llama):
    with pytest.raises(SurgeryError, match="past_key_values") as error:
        llama[1](ids(1, 3), past_key_values=T.StaticCache(config=llama[0].config, max_cache_len=16))
    assert code(error) == "S0831"


# --- other frameworks -------------------------------------------------------------------------------------------------------------


def test_the_trainer_reaches_the_live_models_losses(tmp_path):
    model = live(T.LlamaForCausalLM, T.LlamaConfig(num_key_value_heads=2, **LM, **TEXT), scale=1.0)
    module = module_for(model)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids(16, 10)]
    found = []
    for which, each in enumerate((model, module)):
        options = T.TrainingArguments(
            str(tmp_path / str(which)), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, report_to=[],
            save_steps=2, seed=3, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = T.Trainer(each, options, train_dataset=data)
        trainer.train()
        found.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert len(found[0]) == 4 and found[0] == pytest.approx(found[1], abs=1e-4) and found[0][-1] < found[0][0]
    from surgery.model.artifact import load

    again = load(tmp_path / "1" / "checkpoint-4")
    assert torch.equal(again(ids(1, 5)).logits, module.eval()(ids(1, 5)).logits)
    resumed = T.Trainer(module_for(model), options, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-2"))
    losses_again = [e["loss"] for e in resumed.state.log_history if "loss" in e]
    assert losses_again[-2:] == pytest.approx(found[1][-2:], abs=1e-4)


def test_torch_compile_runs_it(bert):
    torch._dynamo.reset()
    module = copy.deepcopy(bert[1])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    tokens, mask = padded(2, 8)
    assert torch.allclose(compiled(tokens, attention_mask=mask).last_hidden_state, module(tokens, mask).last_hidden_state, atol=1e-5)


class Net(nn.Module):
    """A module that no library knows: positional and keyword inputs, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale):
        h = self.norm(torch.relu(self.inner(x)))
        return {"out": self.drop(h) * scale, "pair": (h.sum(-1), h)}


def test_a_plain_module_keeps_its_signature():
    torch.manual_seed(0)
    net = Net().eval()
    captured = capture_module(net, (torch.randn(2, 6), torch.randn(2, 1)))
    weights = Weights({n: held(p) for n, p in net.named_parameters()})
    program = assemble(captured, weights, ModelInfo("net", architecture="Net"))
    module = build_module(program, {n: e.tensor for n, e in program.weights.items()})
    x, scale = torch.randn(5, 6), torch.randn(5, 1)
    for got in (module(x, scale), module(x, scale=scale)):
        assert torch.equal(net(x, scale)["out"], got["out"]) and torch.equal(net(x, scale)["pair"][1], got["pair"][1])
    assert type(module).__name__ == "Net" and isinstance(module.inner, nn.Linear)
    assert not torch.equal(module.train()(x, scale)["out"], net(x, scale)["out"])
    with pytest.raises(SurgeryError, match="Net takes 2 positional inputs, 3 were given"):
        module(x, scale, x)
