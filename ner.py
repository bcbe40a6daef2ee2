"""Find personal data: a spiking tagger for named entities (PII), as Real Sam has one.

python ner.py                          train on built-in sentences, print the scores
python ner.py --dataset=FILE.jsonl     train on your own: JSON Lines as of ai4privacy, or CoNLL
python ner.py --eval=FILE.jsonl        score the trained tagger
python ner.py --tag="I am Ann Lee, my number is 555-0199"
python ner.py --redact=FILE.txt        print the file with [NAME] in place of a name
python ner.py --block=gpt --n_hidden=128 --d_ff=232      the transformer, of equal size
python ner.py --block=snn --spikes=False                 the float control of --block=snn

A word is a time step. It enters as the sum of rows of a hash table, one for each of its features
(letters, shape, prefixes, suffixes), so that unknown names are read too. Then follow blocks of the
language models; every second one reads the sentence from its end. Tags are BIO: B-NAME begins a
name, I-NAME continues it, O is anything else; a conditional random field scores their sequence.
"""

import itertools
import math
import random
import sys
from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

import config
from checkpoint import check_weights, environment, locked, read_tensors
from checkpoint import set_aside, whole_file, write_result
from lif import Report, Seen
from model import ModelConfig, SpikingLM, spike_encode
from pii import built_in, features, read_records, spans_of, tags_of, varied, words_of

LONGEST = 256  # words that the tagger reads at once
FORGET = 0.3  # training hides this share of a word's features, and half as many whole words


@dataclass(frozen=True)
class NerConfig(ModelConfig):
    # model
    vocab_size: int = 16384  # rows of the hash table
    n_embd: int = 128  # width of a row
    n_hidden: int = 192  # neurons per block
    n_layer: int = 4  # blocks: the first reads forwards, the second backwards, and so on
    d_ff: int = 288  # width of the feed-forward part of snn and gpt
    beta_high: float = 0.9  # membrane decays start between beta_low and this
    # training and use
    dataset: str = "built-in"  # built-in | FILE; every 20th record of a file is held out
    max_steps: int = 1200  # optimiser steps
    words: int = 768  # words in one optimiser step
    lr: float = 4e-3  # peak learning rate of AdamW
    eval: str = ""  # score the tagger on this file
    tag: str = ""  # print the entities of this text
    redact: str = ""  # print this file with labels in place of entities
    ckpt: str = ""  # file of a trained tagger, or its folder; empty: out_dir
    out_dir: str = "out/ner"  # where training writes ner.pt
    result: str = ""  # also write the scores to this .json file
    threads: int = 0  # CPU threads; 0 leaves it to torch
    seed: int = 1337  # of weights, sentences and batches

    CHOICES = {"block": ("sam", "snn", "gpt"), "traits": ("none",)}
    RANGE = {"max_steps": (1, math.inf), "words": (1, math.inf), "lr": (0, 1), "threads": (0, 999)}

    def __post_init__(self):
        super().__post_init__()
        if self.block == "sam" and not self.spikes:
            raise ValueError("only block=snn has a float control: set --block=snn too")


# ---- the tagger ---------------------------------------------------------------------------------


class Tagger(SpikingLM):
    """The language model with a table of features in front; its vocabulary is the tags."""

    def __init__(self, c, labels):
        tags = ["O"] + [f"{kind}-{label}" for label in labels for kind in "BI"]
        encoder = "float" if c.block == "gpt" or not c.spikes else c.encoder
        super().__init__(replace(c, vocab_size=len(tags), encoder=encoder))
        self.labels, self.tags = labels, tags
        self.table = torch.nn.Parameter(torch.zeros(c.vocab_size, c.n_embd))  # unseen adds nothing
        self.follow = torch.nn.Parameter(torch.zeros(len(tags), len(tags)))
        self.size = sum(p.numel() for p in self.parameters())

    def forward(self, words):
        """Logits (B, T, tags) of B sentences of T words each, and a Report."""
        found = [features(*word) for sentence in words for word in sentence]
        sizes = torch.tensor([len(word) for word in found])
        rows = torch.tensor([row for word in found for row in word])
        keep = torch.ones(len(rows))
        if self.training:
            read = torch.rand(len(sizes)) >= FORGET / 2
            keep *= read.repeat_interleave(sizes) & (torch.rand(len(rows)) >= FORGET)
        x = F.embedding_bag(
            rows % len(self.table), self.table, sizes.cumsum(0) - sizes, mode="sum",
            per_sample_weights=keep,
        ).view(len(words), len(words[0]), -1)  # fmt: skip
        report, seen = Report(), Seen(None, self.stress)
        report.macs += round(len(rows) / len(sizes) * x.shape[-1])  # additions, in fact
        x = spike_encode(x) if self.config.encoder == "spikes" else x
        x = x if self.proj_in is None else self.proj_in(x, report)
        for i, part in enumerate(self.parts.values()):
            dims = [1] * (i % 2)  # what to flip: time, for every second block
            x = part(x.flip(dims), None, seen, report)[0].flip(dims)
        return self.readout(x, None, report)[0], report

    def loss(self, logits, tags, report):
        """Nats per word of tags (B, T) by a conditional random field, and the other losses."""
        follow = self.follow[tags[:, :-1], tags[:, 1:]].sum(1)
        score = logits.gather(2, tags[..., None]).sum((1, 2)) + follow
        total = logits[:, 0]  # log of the sum over all sequences that end in a tag, (B, tags)
        for now in logits.unbind(1)[1:]:
            total = (total[:, :, None] + self.follow).logsumexp(1) + now
        nats = (total.logsumexp(1) - score).mean() / tags.shape[1]
        return nats, super().loss(logits, tags, report)[1]

    def likeliest(self, logits):
        """The likeliest tags, B lists of T: Viterbi's algorithm."""
        best, origins = logits[:, 0], []
        for now in logits.unbind(1)[1:]:
            best, origin = (best[:, :, None] + self.follow).max(1)
            best = best + now
            origins.append(origin)
        path = [best.argmax(1)]
        for origin in reversed(origins):
            path.append(origin.gather(1, path[-1][:, None])[:, 0])
        return [[self.tags[k] for k in row] for row in torch.stack(path[::-1], 1).tolist()]

    @torch.no_grad()
    def find(self, texts, work):
        """The spans of each text; work adds up what that takes."""
        places, words = zip(*map(words_of, texts))
        tags, groups = [["O"] * len(at) for at in places], defaultdict(list)
        for i, sentence in enumerate(words):
            for a in range(0, len(sentence), LONGEST):
                groups[len(sentence[a : a + LONGEST])].append((i, slice(a, a + LONGEST)))
        for group in groups.values():
            for batch in (group[j : j + 32] for j in range(0, len(group), 32)):
                logits, report = self([words[i][part] for i, part in batch])
                for (i, part), found in zip(batch, self.likeliest(logits)):
                    tags[i][part] = found
                n = logits[..., 0].numel()
                triggered, every = map(sum, zip((0, 0), *report.synapses))
                work.update(words=n, macs=n * report.macs, synops=n * triggered, synapses=n * every)
                work["rates"] += n * torch.tensor([rate.mean() for rate in report.rates])
        return [spans_of(*pair) for pair in zip(tags, places)]


def load(c):
    """The Tagger that `train` saved."""
    path = Path(c.ckpt or c.out_dir)
    path = path / "ner.pt" if path.is_dir() else path
    saved = read_tensors(path, "tagger", "ner.py")
    try:
        tagger = Tagger(NerConfig(**saved["config"]), saved["labels"])
        check_weights(saved["model"], tagger)
    except (AttributeError, KeyError, TypeError, RuntimeError):
        raise ValueError(f"{path} is no tagger of this ner.py: train one") from None
    tagger.load_state_dict(saved["model"])
    return tagger.eval()


# ---- training and use ---------------------------------------------------------------------------


def sentences(c, held, bad):
    """The sentences of the dataset that are held out, or the others; once, if they are a file's."""
    if c.dataset == "built-in":
        return itertools.islice(built_in(c.seed, held), 1000)
    records = enumerate(read_records(c.dataset, bad))
    return (record for i, record in records if (i % 20 == 0) == held)


def batches(c):
    """Endless batches (words, tags) of sentences of one length: nothing is padded. Each is the
    beginning of a sentence and the end of another, with words strewn in, some made up: else the
    tagger would learn phrases that many sentences share, and take all that is new for an entity."""
    rng, pool, groups = random.Random(c.seed), [], defaultdict(list)
    known = defaultdict(lambda: deque(maxlen=1000))  # of each tag
    for epoch in itertools.count():
        for text, spans in sentences(replace(c, seed=c.seed + epoch), False, Counter()):
            places, words = words_of(text)
            tags = tags_of(spans, places)
            cuts = [i for i, tag in enumerate(tags) if tag[0] != "I"]  # never within an entity
            pool += [(words, tags, cuts)] * bool(words)
            for word, tag in zip(words, tags):
                known[tag].append(word)
            if len(pool) <= 4096:
                continue
            words, tags, cuts = pool.pop(rng.randrange(len(pool)))  # random order
            more, more_tags, more_cuts = rng.choice(pool)
            a, b = rng.choice([*cuts[1:], len(words)]), rng.choice(more_cuts)
            words, tags = (words[:a] + more[b:])[:LONGEST], (tags[:a] + more_tags[b:])[:LONGEST]
            groups[len(words)].append((varied(words, tags, known, rng), tags))
            if len(groups[len(words)]) * len(words) >= c.words:
                yield zip(*groups.pop(len(words)))


def train(c, bad):
    """Train a Tagger as the settings say and save it as out_dir/ner.pt."""
    labels = {label for _, spans in sentences(c, False, bad) for _, _, label in spans}
    if not labels:
        raise ValueError(f"{c.dataset} has too few entities: there is nothing to learn")
    if aside := set_aside(Path(c.out_dir)):
        print(f"the tagger that was in {c.out_dir} is kept in {aside}")
    torch.manual_seed(c.seed)
    tagger, losses = Tagger(c, sorted(labels)), []
    print(f"{tagger.size / 1e6:.2f}M parameters")
    matrices = {"params": [p for p in tagger.parameters() if p.dim() > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in tagger.parameters() if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.95), fused=True)
    warm_up = 0.1 + 1e-9  # where it is one step exactly, OneCycleLR divides by zero
    rate = OneCycleLR(optimizer, c.lr, c.max_steps, pct_start=warm_up, cycle_momentum=False)
    for step, (words, tags) in zip(range(1, c.max_steps + 1), batches(c)):
        logits, report = tagger(words)
        tags = torch.tensor([[tagger.tags.index(tag) for tag in sentence] for sentence in tags])
        nats, others = tagger.loss(logits, tags, report)
        (nats + sum(others.values())).backward()
        losses.append(nats.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss became {losses[-1]} at step {step}: lower --lr")
        tagger.observe(losses[-1], torch.cat(report.rates or [tagger.rate]).detach())
        torch.nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % max(1, c.max_steps // 10) == 0:
            print(f"step {step}: {sum(losses) / len(losses):.3f} nats per word", flush=True)
            losses.clear()
    with whole_file(Path(c.out_dir, "ner.pt")) as file:
        saved = {"config": asdict(c), "labels": tagger.labels, "model": tagger.state_dict()}
        torch.save(saved, file)
    return tagger.eval()


def evaluate(tagger, records, bad, c=NerConfig()):
    """Print and return F1, {label: (exact: label and both ends; partial: some overlap)}; costs."""
    counts, work, records, scores = defaultdict(Counter), Counter(), iter(records), {}
    while chunk := list(itertools.islice(records, 256)):
        for (_, true), found in zip(chunk, tagger.find([text for text, _ in chunk], work)):
            for name, spans, others in (("true", true, found), ("found", found, true)):
                for a, b, label in spans:
                    near = any(label == x and a < d and c < b for c, d, x in others)
                    for n in (counts[label], counts["all"]):
                        n.update({name: 1, f"near {name}": near, "exact": (a, b, label) in others})
    if not counts:
        raise ValueError("nothing to score: there are no entities, neither true nor found")
    print(f"{'F1':20} exact  partial  entities  found")
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        n = counts[name]  # an exact one was counted twice, as true and as found
        recall, precision = (n[f"near {x}"] / max(1, n[x]) for x in ("true", "found"))
        partial = 2 * precision * recall / max(1e-9, precision + recall)
        scores[name] = n["exact"] / (n["true"] + n["found"]), partial
        print(f"{name:20} {scores[name][0]:.3f}    {partial:.3f}  {n['true']:8}  {n['found']:5}")
    words = work["words"]
    if work["synapses"]:
        print("firing rate ", *(f"{rate:.1%}" for rate in work["rates"] / words))
        print(f"SynOps       {work['synops'] / words:.0f} of {work['synapses'] / words:.0f} a word")
    print(f"float-fed    {work['macs'] / words:.0f} multiplications per word")
    if bad["spans"]:
        print(f"left out: {bad['spans']} entities whose offsets do not fit their text")
    if c.result:
        per_word = {name: torch.as_tensor(n / words).tolist() for name, n in work.items()}
        found = {"f1": scores, "per_word": per_word, "parameters": tagger.size}
        write_result(c.result, environment(torch.device("cpu"), tagger.config.seed) | found)
    return scores


def redact(tagger, path):
    """The file to stdout, [LABEL] in place of entities, line by line (64 kB of a longer one)."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = iter(lambda: file.readline(1 << 16), "")
        while chunk := list(itertools.islice(lines, 64)):
            for text, spans in zip(chunk, tagger.find(chunk, Counter())):
                for start, end, label in reversed(spans):
                    text = f"{text[:start]}[{label}]{text[end:]}"
                sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))


def main(argv):
    with config.one_line():
        c, bad = config.load(NerConfig, argv), Counter()
        torch.set_num_threads(c.threads or torch.get_num_threads())
        if c.tag:
            for start, end, label in load(c).find([c.tag], Counter())[0]:
                print(start, end, label, c.tag[start:end], sep="\t")
        elif c.redact:
            redact(load(c), c.redact)
        elif c.eval:
            evaluate(load(c), read_records(c.eval, bad), bad, c)
        else:
            Path(c.out_dir).mkdir(parents=True, exist_ok=True)
            with locked(c.out_dir):
                evaluate(train(c, bad), sentences(c, True, Counter()), bad, c)


if __name__ == "__main__":
    main(sys.argv[1:])
