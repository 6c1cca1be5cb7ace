"""Make the demo model: a tiny Llama that recalls facts from its prompt. One CPU thread, fixed seeds, a few minutes.

    .venv/bin/python cli/demo/make_demo_recall.py OUT [--steps 700]

The chat message "red = 4 7 1 ; blue = 2 2 8 ; red ?" is answered with "4 7 1". The answer can only come from the KV of the
prompt, so a wrong or missing block shows at once. What is installed by hand and what is learned: cli/demo/README.md.
"""

# ruff: noqa: SIM905  (a script for people; a word list is read, not parsed)

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

PAD, BOS, EOS, UNK, EQUALS, ASK, SEPARATOR = range(7)
FIRST_DIGIT = 7
FIRST_KEY = FIRST_DIGIT + 10
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
KEYS = (
    "red blue green yellow orange purple pink brown black white grey silver gold cyan magenta violet indigo crimson scarlet teal "
    "apple banana cherry grape lemon lime mango melon olive peach pear plum berry coconut fig date tomato potato carrot onion "
    "garlic pepper salt sugar honey bread butter cheese milk cream coffee tea water juice wine beer rice bean corn wheat "
    "dog cat horse cow pig sheep goat duck goose hen fox wolf bear lion tiger mouse rabbit deer frog fish "
    "whale shark eagle hawk owl crow swan bee ant spider river lake ocean sea island mountain hill valley forest desert "
    "field garden tree flower leaf root seed grass rose lily tulip sun moon star cloud rain snow wind storm thunder "
    "fire ice stone sand iron copper zinc tin lead nickel steel glass paper wood cotton wool silk leather rubber plastic "
    "house door window wall roof floor table chair bed lamp clock mirror book pen pencil letter map key lock box "
    "bag basket bottle cup plate bowl knife fork spoon pot hammer nail saw rope wheel engine bridge road train ship "
    "boat plane car truck bicycle hat coat shirt shoe glove ring crown sword drum piano guitar violin bell candle anchor"
).split()
VOCABULARY = [*SPECIAL, "=", "?", ";", *"0123456789", *KEYS]
WORD_MARK = "\u2581"  # stands for the space before a word, as in SentencePiece

HEAD_DIM, ROPE_THETA, HIDDEN = 64, 1e6, 128
MAX_TOKENS = 4096
MATCH_FROM = 12  # RoPE channels from here on turn so slowly that they can carry content at any distance used here
# All messages in one line. ';' separates them, but an answer follows its question directly, as in training; so the prompt of one
# turn and its answer are a prefix of the next turn's prompt, and their KV is reused.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set said = namespace(any=false) %}{% for message in messages %}{% set text = (message['content'] or '') | trim %}"
    "{% if text %}{% if said.any %}{{ ' ' if message['role'] == 'assistant' else ' ; ' }}{% endif %}{{ text }}"
    "{% set said.any = true %}{% endif %}{% endfor %}"
)


def make_tokenizer() -> Tokenizer:
    """Word-level tokenizer: known words, single digits, '=', '?' and ';' are one token each, all else is <unk>."""
    assert len(KEYS) == len(set(KEYS)) == 200
    marked = [word if word in SPECIAL else WORD_MARK + word for word in VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(marked)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split("=", "isolated"),  # a symbol, not punctuation, to Unicode
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Metaspace(replacement=WORD_MARK, prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=WORD_MARK, prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def make_config() -> LlamaConfig:
    """0.76 million parameters; 2 of 4 heads share keys and values, so that grouped heads are exercised."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=352,
        num_hidden_layers=3,
        head_dim=HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        initializer_range=0.088,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


@dataclass
class Batch:
    """Token ids and the id wanted after each position (-100: none); both of shape (rows, tokens)."""

    token_ids: torch.Tensor
    labels: torch.Tensor


class Examples:
    """Random prompts: facts, noise and questions. All rows of a batch have the same structure and different words."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def start(self, rows: int, num_facts: int) -> None:
        """Begin a batch: other keys and values for every row."""
        order = torch.stack([torch.randperm(len(KEYS) + 1, generator=self.generator)[:num_facts] for _ in range(rows)])
        self.keys = torch.where(order == len(KEYS), UNK, order + FIRST_KEY)  # an unknown word can be a key as well
        self.values = torch.randint(0, 10, (rows, num_facts, 3), generator=self.generator) + FIRST_DIGIT
        self.columns = [torch.full((rows,), BOS)]
        self.wanted = [torch.full((rows,), -100)]

    def put(self, token: torch.Tensor | int, label: torch.Tensor | int = -100) -> None:
        """Append one column."""
        for columns, value in ((self.columns, token), (self.wanted, label)):
            columns.append(value if isinstance(value, torch.Tensor) else torch.full_like(columns[0], value))

    def fact(self, index: int) -> None:
        """key = d d d. The model is to end a turn that asks nothing, so EOS is wanted after the last digit."""
        self.put(self.keys[:, index])
        self.put(EQUALS)
        for i in range(3):
            self.put(self.values[:, index, i], EOS if i == 2 else -100)

    def question(self, known: int, repeats: int = 1) -> None:
        """key ? d d d, of one of the first `known` facts. After EOS (a caller may ignore it) the digits are wanted again."""
        rows = torch.arange(len(self.keys))
        pick = torch.randint(0, known, (len(rows),), generator=self.generator)
        digits = self.values[rows, pick]
        self.put(self.keys[rows, pick])
        self.put(ASK, digits[:, 0])
        for again in range(repeats):
            if again:
                self.put(EOS, digits[:, 0])
            for i in range(3):
                self.put(digits[:, i], EOS if i == 2 else digits[:, i + 1])

    def separator(self, noisy: bool) -> None:
        """';', sometimes with unknown words or a second ';' behind."""
        self.put(SEPARATOR, EOS)
        while noisy and self.choose.random() < 0.08:
            self.put(self.choose.choice((UNK, UNK, SEPARATOR)))

    def batch(self, rows: int, num_facts: int, num_questions: int, noisy: bool = True) -> Batch:
        """Facts, then questions; sometimes a few questions already between the facts, as in a chat of several turns."""
        self.start(rows, num_facts)
        while noisy and self.choose.random() < 0.15:
            self.put(UNK)
        early = self.choose.randint(1, num_facts) if noisy and self.choose.random() < 0.3 else 0
        for index in range(num_facts):
            self.fact(index)
            self.separator(noisy)
            if index + 1 == early:
                self.question(early)
                self.separator(noisy)
        for _ in range(num_questions):
            self.question(num_facts, self.choose.choice((1, 1, 1, 3)) if noisy else 1)
            self.separator(noisy)
        return Batch(torch.stack(self.columns, 1), torch.stack(self.wanted, 1))


def install_look_back(model: LlamaForCausalLM, offsets: Sequence[int] = (1, 2, 3, 4), gap: float = 6.0, fast: int = 6) -> None:
    """Set layer 0 so that head h looks at the token offsets[h] back.

    A constant residual channel feeds queries and keys whose RoPE phase peaks at that distance; equal embedding norms keep
    the peak in place.
    """
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    theta = ROPE_THETA ** (-torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    on = (torch.arange(HEAD_DIM // 2) < fast).float()
    embeddings = model.model.embed_tokens.weight
    embeddings[:, 0] = 0
    embeddings.mul_(0.5 * HIDDEN**0.5 / embeddings.norm(dim=1, keepdim=True))
    embeddings[:, 0] = 1.5
    scale = (gap * HEAD_DIM**0.5 / ((1 - theta.cos()) * on).sum()).sqrt() * embeddings.pow(2).mean(1).sqrt().mean() / 1.5
    attention = model.model.layers[0].self_attn
    for head, offset in enumerate(offsets):
        for weight, i, value in (
            (attention.q_proj.weight, head, torch.cat([(offset * theta).cos() * on, -(offset * theta).sin() * on])),
            (attention.k_proj.weight, head // group, torch.cat([on, 0 * on])),
        ):
            weight[i * HEAD_DIM : (i + 1) * HEAD_DIM] = 0
            weight[i * HEAD_DIM : (i + 1) * HEAD_DIM, 0] = value * scale


@torch.no_grad()
def install_circuit(model: LlamaForCausalLM, examples: Examples, logit: float = 20.0) -> None:
    """Start from a wired recall circuit; training does the rest (embeddings, copying, output, MLPs).

    Embeddings live in channels 0..47. Head h of layer 0 writes the token seen h + 1 back into 20 channels of its own. Layers
    1 and 2 compare 'j back' here with 'j + 1 back' there, in slow RoPE channels: after `red ?`, the digit behind `red =`.
    """
    layers, embeddings = model.model.layers, model.model.embed_tokens.weight
    width = HEAD_DIM // 2 - MATCH_FROM

    def written(head: int) -> slice:
        return slice(48 + width * head, 48 + width * (head + 1))

    def inner(head: int) -> slice:
        return slice(head * HEAD_DIM + MATCH_FROM, head * HEAD_DIM + HEAD_DIM // 2)

    embeddings[:, 48:] = 0
    embeddings[:, 1:48] *= 0.82 * HIDDEN**0.5 * 0.5 / embeddings[:, 1:48].norm(dim=1, keepdim=True)
    project = torch.linalg.qr(torch.randn(47, width))[0].T
    install_look_back(model)
    attention = layers[0].self_attn
    attention.v_proj.weight.mul_(0.05)
    attention.o_proj.weight.mul_(0.05)
    for kv in range(2):
        attention.v_proj.weight[kv * HEAD_DIM : (kv + 1) * HEAD_DIM].zero_()
        attention.v_proj.weight[inner(kv), 1:48] = project
    for head in range(4):
        attention.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].zero_()
        attention.o_proj.weight[written(head), inner(head)] = torch.eye(width)
    layers[0].mlp.down_proj.weight.mul_(0.1)

    seen: list[torch.Tensor] = []
    hook = layers[1].input_layernorm.register_forward_hook(lambda module, args, output: seen.append(output))
    model.model(examples.batch(64, 6, 6, noisy=False).token_ids)
    hook.remove()
    strength = (logit * HEAD_DIM**0.5 / seen[0][:, 8:, written(0)].pow(2).sum(-1).mean()).sqrt()
    for layer, query_head, kv_head, here, there in ((1, 0, 0, 0, 1), (1, 2, 1, 1, 2), (2, 0, 0, 2, 3)):
        attention = layers[layer].self_attn
        for weight, i, source in ((attention.q_proj.weight, query_head, here), (attention.k_proj.weight, kv_head, there)):
            weight[i * HEAD_DIM : (i + 1) * HEAD_DIM] = 0
            weight[inner(i), written(source)] = strength * torch.eye(width)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, num_facts: int, rows: int = 64, seed: int = 7) -> float:
    """Share of questions answered right: all three digits and the end."""
    model.eval()
    batch = Examples(seed).batch(rows, num_facts, 1, noisy=False)
    predicted = model(batch.token_ids).logits.argmax(-1)[:, -6:]
    labels = batch.labels[:, -6:]
    model.train()
    return float(((predicted == labels) | (labels == -100)).all(1).float().mean())


def train(model: LlamaForCausalLM, examples: Examples, steps: int, peak_rate: float = 1e-3) -> None:
    """AdamW with cosine decay; more facts as soon as nine of ten questions are answered right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started, most = time.monotonic(), 6
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * min(1, step / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        num_facts = most if examples.choose.random() < 0.5 else examples.choose.randint(2, most)
        batch = examples.batch(max(4, min(32, 2000 // (num_facts * 12))), num_facts, num_facts)
        logits = model(batch.token_ids).logits
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch.labels.reshape(-1), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            right = accuracy(model, most)
            print(f"step {step} {time.monotonic() - started:.0f} s loss {loss.item():.3f} right at {most} facts {right:.2f}", flush=True)
            if right > 0.9:
                most = min(48, int(most * 1.5) + 1)


@torch.no_grad()
def prove_kv(model: LlamaForCausalLM, num_prompts: int = 300, num_facts: int = 16) -> dict[str, int]:
    """Right answers out of num_prompts when the last prompt token runs on its own KV, on another prompt's, on zeros.

    The other prompt has the same keys and question, and other values. A blind guess is right once in 1,000.
    """
    right = {"own KV": 0, "KV of other values": 0, "zeroed KV": 0}
    examples = Examples(11)
    for _ in range(num_prompts):
        examples.start(2, num_facts)
        examples.keys[1] = examples.keys[0]
        for index in range(num_facts):
            examples.fact(index)
            examples.separator(noisy=False)
        asked = examples.choose.randrange(num_facts)
        examples.put(examples.keys[:, asked])
        examples.put(ASK)
        prompts, want = torch.stack(examples.columns, 1), [*examples.values[0, asked].tolist(), EOS]
        for name, row in (("own KV", 0), ("KV of other values", 1), ("zeroed KV", 0)):
            cache = model(prompts[row : row + 1, :-1], use_cache=True).past_key_values
            if name == "zeroed KV":
                for layer in cache.layers:
                    layer.keys.zero_()
                    layer.values.zero_()
            token, said = ASK, []
            while len(said) < 4:
                token = int(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1].argmax())
                said.append(token)
            right[name] += said == want
    return right


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write an ordinary Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.max_length = None
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train, save, print what the model can do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, examples = LlamaForCausalLM(make_config()), Examples(1)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.5)
        model.lm_head.weight.mul_(0.3)
    install_circuit(model, examples)
    train(model, examples, arguments.steps)
    save(model.eval(), make_tokenizer(), arguments.out)
    print({f"{n} facts": round(accuracy(model, n, 256, seed=8), 3) for n in (4, 8, 16, 32, 64, 128)})
    right = prove_kv(model.eval())
    print("right out of 300 at 16 facts:", right)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {size} bytes in {arguments.out}")
    if accuracy(model, 16, 256, seed=8) < 0.95 or right["own KV"] < 295 or max(right["KV of other values"], right["zeroed KV"]) > 3:
        sys.exit("the model does not recall well enough; use more steps")


if __name__ == "__main__":
    main()
