"""Trains bora-demo from nothing on conversations that it makes as it goes, then measures it on held-out ones.

    python3 train.py --out OUT                                    # one GPU; the figures are in docs/demo-model.md
    python3 train.py --out OUT --start DIRECTORY                  # goes on from these weights
    python3 train.py --out OUT --device cpu --steps 200 --tokens 4096 --layers 2 --hidden 64 --intermediate 128

Writes OUT/bf16 (Hugging Face layout), OUT/loss.csv, OUT/heldout.json, OUT/heldout-wrong.json. Every step's batch is decided by the seed
and the step's number. The rate follows the larger of the share of --steps and the share of --seconds that is over, so that it falls to
zero within both: the only thing here that depends on a clock.
"""

import argparse
import json
import pathlib
import time

import torch
import torch.nn.functional as F

import conversations
import values
from encoder import PAD, Encoder
from model import Config, Model

# share of the steps that train each length, by how far the run is; a run that starts from trained weights has the last row alone
CURRICULUM = [
    (0.12, {256: 50, 512: 50}),
    (0.38, {256: 20, 512: 40, 1024: 30, 2048: 10}),
    (0.65, {256: 12, 512: 27, 1024: 27, 2048: 14, 4096: 10, 8192: 6, 16384: 3, 32768: 1}),
    (1.01, {256: 8, 512: 22, 1024: 36, 2048: 12, 4096: 8, 8192: 6, 16384: 4, 32768: 4}),
]


class Batches(torch.utils.data.IterableDataset):
    """(ids [batch, length], places that predict a written token, those tokens): one item a step."""

    def __init__(self, options):
        self.options = options

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        encoder = Encoder()
        for step in range(first, self.options.steps, every):
            yield self.batch(encoder, step)

    def batch(self, encoder, step):
        rng = values.generator(self.options.seed, step)
        share = 1 if self.options.start else step / self.options.steps
        weights = next(w for until, w in CURRICULUM if share < until)
        weights = {length: w for length, w in weights.items() if length <= self.options.tokens}
        length = rng.choices(list(weights), list(weights.values()))[0]
        rows = self.options.tokens // length
        made = [conversations.make(encoder, rng, length)[1:] for _ in range(rows)]
        return collate(made, length)


def collate(made, length):
    ids = torch.full((len(made), length), PAD, dtype=torch.int32)
    places = []
    for row, (row_ids, mask) in enumerate(made):
        ids[row, : len(row_ids)] = torch.tensor(row_ids, dtype=torch.int32)
        places.append(torch.tensor(mask[1:], dtype=torch.bool).nonzero()[:, 0] + row * length)
    places = torch.cat(places)
    return ids, places, ids.view(-1)[places + 1].long()


def orthogonalize(update):
    """Newton-Schulz iteration of Muon: each matrix of the stack [layers, out, in] towards the nearest
    semi-orthogonal one."""
    x = update.bfloat16()
    flip = x.shape[1] > x.shape[2]
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if flip else x).float()


class Optimizer:
    """Muon for the linears, Adam for the embedding and the norms."""

    def __init__(self, model, options):
        self.options = options
        self.stacks = list(model.stacks.values())
        self.momentum = [torch.zeros_like(p) for p in self.stacks]
        rest = [model.embedding], [model.final, *model.norms.values()]
        self.adam = torch.optim.AdamW([{"params": rest[0], "peak": options.embedding_rate}, {"params": rest[1], "peak": 0.002}], lr=0.001, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0,
                                      fused=model.embedding.is_cuda)
        self.orthogonalize = torch.compile(orthogonalize) if model.embedding.is_cuda else orthogonalize

    @torch.no_grad()
    def step(self, part):
        """`part` of the peak rates, 0 to 1."""
        for parameter, momentum in zip(self.stacks, self.momentum):
            momentum.lerp_(parameter.grad, 0.05)
            update = self.orthogonalize(parameter.grad.lerp(momentum, 0.95))
            rate = self.options.rate * part * max(1, parameter.shape[1] / parameter.shape[2]) ** 0.5
            parameter.mul_(1 - rate * self.options.decay).add_(update, alpha=-rate)
            parameter.grad = None
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * part
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def heldout_sets(encoder, count):
    """Held-out conversations by kind: words, schemas and phrases that training never uses."""
    c = conversations
    kinds = {"one call": [(c.one_call, 1)], "steps": [(c.several_steps, 1)], "parallel": [(c.parallel, 1)], "chained": [(c.chained, 1)], "edit": [(c.edit, 1)],
             "no tool fits": [(c.no_such_tool, 1)], "code": [(c.write_code, 1)], "identity": [(c.identity, 1)], "talk": [(c.small_talk, 1)], "json": [(c.as_json, 1)],
             "repeat": [(c.repeat, 1)], "count": [(c.counting, 1)], "story": [(c.story, 1)]}
    for name, episodes in kinds.items():
        yield name, 1024, [c.make(encoder, values.generator("held", name, i), 1024, True, episodes, fill=False)[1:] for i in range(count)]
    for name in ("one call", "steps", "parallel", "chained"):  # phrases of training, words and schemas that are not
        yield f"{name}, known phrases", 1024, [c.make(encoder, values.generator("held", name, i), 1024, True, kinds[name], fill=False, unheard=False)[1:] for i in range(count)]
    for length, number in ((1024, count), (4096, count), (8192, count // 2), (16384, count // 2), (32768, count // 2)):
        for unheard in (True, False):
            made = []
            for i in range(number):
                request = c.recall_at(encoder, values.generator("recall", length, i), length, True, (i + 0.5) / number, unheard)
                ids, mask = encoder.conversation(request)
                last = len(mask) - len(encoder.message(request["messages"][-1])[0])
                made.append((ids[:length], ([0] * last + mask[last:])[:length]))
            yield f"recall {length}" + ("" if unheard else ", known phrases"), length, made


@torch.no_grad()
def heldout(model, encoder, device, tokens, count):
    """Share of held-out conversations whose every written token is the likeliest one, by kind: what greedy
    decoding gets right to the last token; those longer than `tokens` are left out. And for up to 20 wrong ones of each kind: what stands before the first
    wrong token, that token, the right one."""
    scores, examples = {}, {}
    for name, length, made in heldout_sets(encoder, count):
        if length > tokens:
            continue
        right, rows = 0, max(1, tokens // length)
        for start in range(0, len(made), rows):
            chunk = made[start:start + rows]
            padded = chunk + [([PAD], [0])] * (rows - len(chunk)) if device == "cuda" else chunk
            ids, places, targets = collate(padded, length)
            best = model.logits(model(ids.to(device).long())[places.to(device)]).argmax(-1).cpu()
            wrong = {}
            for index in (best != targets).nonzero()[:, 0].tolist():
                wrong.setdefault(int(places[index]) // length, index)
            for index in list(wrong.values())[: 20 - len(examples.setdefault(name, []))]:
                place = int(places[index])
                before = ids.view(-1)[max(place - 120, place // length * length):place + 1].tolist()
                examples[name].append([encoder.decode(before), encoder.decode([best[index].item()]), encoder.decode([targets[index].item()])])
            right += len(chunk) - len(wrong)
        scores[name] = round(right / len(made), 4)
    return scores, examples


def report(log, losses, waited):
    """Writes every fifth of these (step, tokens, seconds, length, loss) to the log, and their mean to the standard output."""
    for *row, value in losses[::5]:
        log.write(",".join(map(str, row)) + f",{value.item():.4f}\n")
    log.flush()
    step, tokens, seconds = losses[-1][:3]
    mean = sum(row[-1].item() for row in losses) / len(losses)
    print(f"step {step + 1} tokens {tokens / 1e6:.0f}M loss {mean:.4f} {seconds:.0f} s (waited {waited:.1f} s for data)", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--start", help="a directory of bf16 weights to go on from, whose shape is taken; without it, training starts from nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--embedding-rate", type=float, default=0.004)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--heldout", type=int, default=200, help="held-out conversations a kind")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    config = Config(hidden=options.hidden, layers=options.layers, intermediate=options.intermediate)
    model = (Model.load(options.start) if options.start else Model(config, options.seed)).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    if options.device == "cuda":
        model.compile()
    optimizer = Optimizer(model, options)
    loader = torch.utils.data.DataLoader(Batches(options), batch_size=None, num_workers=options.workers,
                                         prefetch_factor=8 if options.workers else None, pin_memory=options.device == "cuda")
    begun, losses, seen, waited, log = time.monotonic(), [], 0, 0.0, open(out / "loss.csv", "w")
    log.write("step,tokens,seconds,length,loss\n")
    asked = time.monotonic()
    for step, (ids, places, targets) in enumerate(loader):
        waited += time.monotonic() - asked
        progress = max(step / options.steps, (time.monotonic() - begun) / options.seconds)
        if progress >= 1:
            break
        part = min(1, (step + 1) / 100) * min(1, (1 - progress) / 0.5)
        ids = ids.to(options.device, non_blocking=True).long()
        hidden = model(ids)[places.to(options.device, non_blocking=True)]
        loss = F.cross_entropy(model.logits(hidden).float(), targets.to(options.device, non_blocking=True))
        loss.backward()
        optimizer.step(part)
        seen += ids.numel()
        losses.append((step, seen, round(time.monotonic() - begun, 1), ids.shape[1], loss.detach()))
        if len(losses) == 100:
            report(log, losses, waited)
            losses = []
        asked = time.monotonic()
    if losses:
        report(log, losses, waited)
    model.eval()
    model.save(out / "bf16")
    print(f"trained in {time.monotonic() - begun:.0f} s; measuring", flush=True)
    scores, examples = heldout(model, Encoder(), options.device, options.tokens, options.heldout)
    (out / "heldout.json").write_text(json.dumps(scores, indent=1) + "\n")
    (out / "heldout-wrong.json").write_text(json.dumps(examples, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(scores), f"{time.monotonic() - started:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
