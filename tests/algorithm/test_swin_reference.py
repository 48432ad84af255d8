"""Whole patched Swin models against a slow forward written with Python loops over images, windows, tokens and heads."""

import math

import torch
from comparing import moved
from matrix import REPRESENTATIVES, cases
from variants import build, images_for

import evopatch
from evopatch import EvoConfig
from evopatch.algorithm.selection import num_slow
from evopatch.algorithm.window_selection import TIE
from evopatch.plan import plan_blocks

WINDOW = 4
MASKED = -100.0


def cut(side, shift):
    """For each window of a square map its tokens: which one, and what part of the image it is from."""
    found = []
    for top in range(0, side, WINDOW):
        for left in range(0, side, WINDOW):
            window = []
            for i in range(WINDOW):
                for j in range(WINDOW):
                    row, column = top + i + shift, left + j + shift
                    window.append(((row % side) * side + column % side, (row >= side, column >= side)))
            found.append(window)
    return found


def position_bias(block, head, i, j):
    """Between two places of a window."""
    rows, columns = i // WINDOW - j // WINDOW, i % WINDOW - j % WINDOW
    attn = block.attn
    if hasattr(attn, "cpb_mlp"):
        coordinates = [
            math.copysign(math.log2(abs(d / (WINDOW - 1) * 8) + 1) / math.log2(8), d) for d in (rows, columns)
        ]
        return 16 * torch.sigmoid(attn.cpb_mlp(torch.tensor(coordinates))[head])
    return attn.relative_position_bias_table[(rows + WINDOW - 1) * (2 * WINDOW - 1) + columns + WINDOW - 1, head]


def attend(block, x, bias):
    """One window `(T, C)` with what is added to its logits, `(H, T, T)`."""
    attn, (tokens, channels) = block.attn, x.shape
    width = channels // attn.num_heads
    if hasattr(attn, "cpb_mlp"):
        qkv = torch.nn.functional.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    else:
        qkv = attn.qkv(x)
    qkv = qkv.reshape(tokens, 3, attn.num_heads, width)
    out = []
    for head in range(attn.num_heads):
        q, k, v = (qkv[:, part, head] for part in range(3))
        out.append((scores(attn, head, q, k) + bias[head]).softmax(-1) @ v)
    return attn.proj(torch.cat(out, dim=1))


def scores(attn, head, q, k):
    if not hasattr(attn, "cpb_mlp"):
        return q @ k.T / math.sqrt(q.shape[-1])
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    return q @ k.T * attn.logit_scale[head, 0, 0].exp().clamp(max=100)


def run_block(block, x, bias):
    if hasattr(block.attn, "cpb_mlp"):
        x = x + block.norm1(attend(block, x, bias))
        return x + block.norm2(block.mlp(x))
    x = x + attend(block, block.norm1(x), bias)
    return x + block.mlp(block.norm2(x))


def seen(block, x):
    return x if hasattr(block.attn, "cpb_mlp") else block.norm1(x)


def unit(x):
    return x / x.norm()


def match(tokens, regions, keep):
    """Slow places of one window, and the groups of places that follow them."""
    typical = [sum((unit(t) @ unit(other)).item() for other in tokens) - TIE * p for p, t in enumerate(tokens)]
    order = sorted(range(len(tokens)), key=lambda p: -typical[p])

    def alike(i, j):
        return (unit(tokens[i]) @ unit(tokens[j])).item() if regions[i] == regions[j] else -math.inf

    redundancy = {p: max((alike(p, q) for q in order[:rank]), default=-math.inf) for rank, p in enumerate(order)}
    slow = sorted(sorted(range(len(tokens)), key=lambda p: (redundancy[p], order.index(p)))[:keep])
    groups = {s: [s] for s in slow}
    for p in range(len(tokens)):
        if p not in groups:
            groups[max(slow, key=lambda s: alike(p, s))].append(p)
    return groups


def reference(model, image, config):
    """Feature maps `(h * w, C)` after every block, for one image."""
    x = model.patch_embed(image[None])
    depths = [len(stage.blocks) for stage in model.layers]
    plans, outputs, g, chosen = iter(plan_blocks(config, *depths)), [], None, {}
    for stage in model.layers:
        x = stage.downsample(x)
        side = x.shape[1]
        if g is not None and len(g) != side * side:
            g = [
                sum(g[(2 * r + a) * 2 * side + 2 * c + b] for a in (0, 1) for b in (0, 1)) / 4
                for r in range(side)
                for c in range(side)
            ]
        for block in stage.blocks:
            plan = next(plans)
            windows = cut(side, block.shift_size[0])
            flat = x.reshape(side * side, -1)
            new_g = g
            if plan.tradeoff is not None and config.representative != "matched":
                new_g = observe(block, flat, windows, g, plan.tradeoff)
            if plan.selects:
                chosen, frozen = {}, g
            groups = {}
            if plan.keep_ratio < 1:
                if block.shift_size not in chosen:
                    chosen[block.shift_size] = choose(config, plan, block, flat, windows, frozen)
                groups = chosen[block.shift_size]
            x = update(config, block, flat, windows, groups).view(x.shape)
            g = new_g
            outputs.append(x[0])
    return outputs


def observe(block, x, windows, g, tradeoff):
    """Attention of the mean query over the mean keys of the windows, accumulated, on the map."""
    attn, tokens = block.attn, seen(block, x)
    width = x.shape[1] // attn.num_heads
    means = torch.stack([torch.stack([tokens[t] for t, _ in w]).mean(0) for w in windows])
    q, k = attn.qkv(tokens.mean(0)), attn.qkv(means)
    if hasattr(attn, "cpb_mlp"):
        q = q + torch.cat([attn.q_bias, attn.q_bias * 0, attn.q_bias * 0])
    rows = []
    for head in range(attn.num_heads):
        own = slice(head * width, (head + 1) * width)
        rows.append(scores(attn, head, q[None, own], k[:, x.shape[1] :][:, own])[0].softmax(-1))
    attention = sum(rows) / len(rows)
    on_map = [0.0] * len(x)
    for value, window in zip(attention.tolist(), windows, strict=True):
        for token, _ in window:
            on_map[token] = value
    return on_map if g is None else [(1 - tradeoff) * old + tradeoff * new for old, new in zip(g, on_map, strict=True)]


def choose(config, plan, block, x, windows, g):
    """Of `"matched"` the groups of every window, else the slow windows and all windows' importances."""
    tokens = seen(block, x)
    if config.representative == "matched":
        keep = num_slow(WINDOW * WINDOW, plan.keep_ratio)
        return [match([tokens[t] for t, _ in w], [region for _, region in w], keep) for w in windows]
    if len(windows) == 1:
        return None
    importance = [sum(g[t] for t, _ in w) / len(w) for w in windows]
    content = [unit(torch.cat([tokens[t] for t, _ in w])) for w in windows]
    loss = [
        importance[v] ** config.importance
        * (1 - max((content[v] @ content[w]).item() for w in range(len(windows)) if w != v))
        for v in range(len(windows))
    ]
    keep = num_slow(len(windows), plan.keep_ratio)
    return sorted(range(len(windows)), key=lambda v: -loss[v])[:keep], importance


def update(config, block, x, windows, groups):
    heads, area = range(block.attn.num_heads), range(WINDOW * WINDOW)
    table = torch.stack(
        [torch.stack([torch.stack([position_bias(block, h, i, j) for j in area]) for i in area]) for h in heads]
    )
    out = x.clone()

    def added(window, i, j):
        return 0.0 if window[i][1] == window[j][1] else MASKED

    if config.representative == "matched" and groups:
        for window, own in zip(windows, groups, strict=True):
            rows = torch.stack([torch.stack([x[window[p][0]] for p in members]).mean(0) for members in own.values()])
            bias = torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack([table[h, i, j] + added(window, i, j) + math.log(len(own[j])) for j in own])
                            for i in own
                        ]
                    )
                    for h in heads
                ]
            )
            change = run_block(block, rows, bias) - rows
            for row, members in zip(change, own.values(), strict=True):
                for place in members:
                    out[window[place][0]] = x[window[place][0]] + row
        return out
    slow, importance = groups or (range(len(windows)), None)
    for v in slow:
        mask = torch.tensor([[added(windows[v], i, j) for j in area] for i in area])
        index = [t for t, _ in windows[v]]
        out[index] = run_block(block, x[index], table + mask)
    fast = [v for v in range(len(windows)) if v not in slow]
    if config.representative == "single" and fast:
        total = sum(importance[v] for v in fast)
        share = {v: importance[v] / total for v in fast}
        rows = torch.stack([sum(share[v] * x[windows[v][place][0]] for v in fast) for place in area])
        together = [[sum(share[v] for v in fast if not added(windows[v], i, j)) for j in area] for i in area]
        mask = torch.tensor([[max(MASKED, math.log(s)) if s else MASKED for s in row] for row in together])
        change = run_block(block, rows, table + mask) - rows
        for v in fast:
            for place in area:
                out[windows[v][place][0]] += change[place]
    return out


ROWS = [
    (name, selection, representative)
    for name in ("swin", "swinv2")
    for selection in ("stage", "layer")
    for representative in REPRESENTATIVES
]


@cases(
    ("name", "selection", "representative"), ROWS, fast=[("swin", "stage", "matched"), ("swinv2", "layer", "single")]
)
@torch.no_grad()
def test_every_stage_of_the_patched_model_equals_the_reference(name, selection, representative):
    model, x = build(name, depths=(3, 4, 2)), images_for(name)
    config = EvoConfig(
        keep_ratio=[0.6, 0.5, 0.4], selection=selection, representative=representative, tradeoff=0.4, importance=0.5
    )
    ends = (2, 6, 8)
    expected = [[reference(model, image, config)[end] for end in ends] for image in x]
    evopatch.apply(model, config=config)
    found = model.forward_intermediates(x, intermediates_only=True)
    for stage in range(3):
        for image in range(2):
            result = found[stage][image].permute(1, 2, 0)
            torch.testing.assert_close(result, expected[image][stage], atol=5e-5, rtol=5e-5)
    evopatch.set_keep_ratio(model, [0.7, 0.5, 0.4])
    assert moved(model.forward_intermediates(x, intermediates_only=True)[2], found[2]) > 1e-4
