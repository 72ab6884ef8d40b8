"""A faster generate: the same distribution as ampo.generate, with more code.

    python data/fast_generate.py --method grpo      # ampo.py with this sampler; all its flags

Read ampo.generate first. It runs one row a rollout and lets transformers' cache grow by
copying. Three tricks make the same loop faster:

1. Rollouts share rows. Rollouts of one prompt that have said the same so far have the same
   keys and values and the same next distribution, so one row of the batch serves them all.
   Each still draws its own token, and a row becomes several where its rollouts part: nothing
   is approximated. It pays where rollouts agree for long: with a trained model, at a low
   temperature, with many samples a prompt. Where they part at once, it only costs the search
   for equals.

2. The cache is a slab. Memory for the longest responses is reserved once, and a step writes
   one slot of it, where a cache that grows by concatenation copies all it holds at each
   token. It pays the more, the longer the responses; what it costs is memory, as slots are
   reserved for tokens that may never come.

3. CUDA graphs. A small model's kernels finish sooner than Python can start them. A graph
   records the kernels of one step and starts them all at once, on the same memory each time,
   so shapes must stay: attention looks at a window of the slab that opens by 256 slots, of
   which those not yet written are masked. It pays on CUDA for small models and steps whose
   rows stay the same; on a CPU there is nothing to record and the window opens slot by slot.

Models with sliding windows are handed to ampo.generate, as a slab keeps every token.
Models that keep no keys and values (RWKV) are refused, as are those that read positions off
a mask of their own shape (BLOOM).

Shapes: P prompts, n rollouts each, L tokens of the longest prompt, R rows of the batch,
A rollouts still running, V vocabulary, D head size.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampo  # before torch, as it sets how torch's threads wait

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, DynamicLayer

CUDA_SPAN = 256  # slots by which the window opens on CUDA
# Rows that nobody reads any more leave together, once no larger share than this would stay:
# each time moves the whole cache and, on CUDA, ends the graph.
LEAST_SHARE = 0.5


# ---------------------------------------------------------------------------------------
# Trick 2: the cache as a slab


def reserve(x, rows, slots):
    """A slab (rows, heads, slots, D) that begins with x (P, heads, L, D)."""
    slab = x.new_empty(rows, x.shape[1], slots, x.shape[3])
    slab[:x.shape[0], :, :x.shape[2]] = x
    return slab


class Slab(DynamicLayer):
    """One layer's keys and values in memory that stays where it is.

    layer: transformers' cache layer after the prefill, keys and values (P, heads, L, D).
    rows, slots: the most that will be needed.
    slot: tensor (1,), where the next token goes. Whoever samples moves it on; a tensor, as a
    graph would keep a number for ever.
    Attention sees .keys and .values, the used rows and the window's slots of the slabs.
    """

    def __init__(self, layer, rows, slots, slot):
        super().__init__()
        self.slot = slot
        self.key_slab = reserve(layer.keys, rows, slots)
        self.value_slab = reserve(layer.values, rows, slots)
        self.show(rows=layer.keys.shape[0], window=layer.keys.shape[2])

    def show(self, rows, window):
        """Set how many rows are in use and how many slots attention looks at."""
        self.keys = self.key_slab[:rows, :, :window]
        self.values = self.value_slab[:rows, :, :window]

    def open_window(self, window):
        """Let attention look at more slots, which are masked until they are written."""
        old = self.keys.shape[2]
        self.show(len(self.keys), window)
        # A masked slot counts as 0 · value, and with what the memory held that could be nan.
        self.keys[:, :, old:] = 0
        self.values[:, :, old:] = 0

    def update(self, keys, values, *args, **kwargs):
        """Called by each attention layer with the new keys and values (R, heads, 1, D)."""
        self.keys[:, :, self.slot] = keys
        self.values[:, :, self.slot] = values
        return self.keys, self.values

    def regroup(self, rows):
        """Put copies of the rows numbered `rows` in the place of all rows."""
        new_keys = self.keys.index_select(0, rows)
        new_values = self.values.index_select(0, rows)
        self.show(len(rows), self.keys.shape[2])
        self.keys.copy_(new_keys)
        self.values.copy_(new_values)


# ---------------------------------------------------------------------------------------
# The batch, and trick 3: its step as a CUDA graph


class Decoder:
    """The rows of the batch: reads the prompts, then one token a row and step.

    .logits (R, V): of the next token, after the prompts or the last step.
    span: the window opens by so many slots at a time.
    graphs: record steps into CUDA graphs.
    Raises InputError for a model that keeps no keys and values.
    """

    def __init__(self, model, prompts, n, max_new_tokens, span, graphs):
        ids, real = ampo.pad(prompts, model.device, side="left")  # (P, L)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        out = model(input_ids=ids, attention_mask=real.long(), position_ids=positions,
                    past_key_values=cache, use_cache=True, logits_to_keep=1)
        if any(layer.keys is None for layer in cache.layers):
            kind = model.config.model_type
            raise ampo.InputError(f"a {kind} model keeps no keys and values")

        self.model = model
        self.span = span
        self.graphs = graphs
        self.used = ids.shape[1]  # slots written so far
        self.window = self.used
        self.slot = torch.tensor([self.used], device=model.device)
        slots = span * math.ceil((self.used + max_new_tokens) / span)
        rows = len(prompts) * n
        self.cache = Cache(layers=[Slab(layer, rows, slots, self.slot) for layer in cache.layers])

        self.logits = out.logits[:, -1]  # (P, V)
        self.ids = ids[:, -1:]  # (R, 1), the token of each row that is read next
        self.positions = real.sum(1, keepdim=True)  # (R, 1), its place in the text
        seen = F.pad(real, (0, slots - self.used))  # (P, slots)
        bias = torch.where(seen, 0.0, -math.inf).to(model.dtype)
        self.bias = bias[:, None, None]  # (R, 1, 1, slots), added to attention's scores
        self.forget_graph()

    def regroup(self, rows):
        """Put copies of the rows numbered `rows` in the place of all rows."""
        for layer in self.cache.layers:
            layer.regroup(rows)
        self.ids = self.ids[rows]
        self.positions = self.positions[rows]
        self.bias = self.bias[rows]
        self.forget_graph()

    def open_window(self):
        """Let attention look at so many more slots that the next one is among them."""
        self.window = self.span * (self.used // self.span + 1)
        for layer in self.cache.layers:
            layer.open_window(self.window)
        self.forget_graph()

    def step(self, row, tokens):
        """Row row[i] goes on with tokens[i]; row, tokens (A,). Returns the logits (R, V)."""
        if self.used == self.window:
            self.open_window()
        self.ids[row, 0] = tokens
        self.bias[..., self.used] = 0
        self.run()
        self.used += 1
        self.slot += 1
        self.positions += 1
        return self.logits

    def run(self):
        """Compute .logits, on CUDA through a graph from the second run on.

        Not from the first: rows often part again at once, and libraries set themselves up in
        a first call, which a graph cannot record.
        """
        if self.graphs and self.has_run and self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, computes nothing
                self.logits = self.forward()
        if self.graph is None:
            self.logits = self.forward()
        else:
            self.graph.replay()
        self.has_run = True

    def forward(self):
        """One token a row through the model. Only reads and writes memory that stays."""
        mask = self.bias[..., :self.window]
        out = self.model(input_ids=self.ids, attention_mask=mask, position_ids=self.positions,
                         past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]

    def forget_graph(self):
        """Called where shapes or tensors change: a graph would go on with the old ones."""
        self.graph = None
        self.has_run = False


# ---------------------------------------------------------------------------------------
# Trick 1: rollouts that have said the same share a row


def share_rows(decoder, row, tokens):
    """Regroup the decoder's rows for rollouts that read `row` and go on with `tokens` (A,).

    A past is a row and the token after it. Returns the row (A,) of each rollout's past.
    """
    vocabulary = decoder.logits.shape[1]
    pasts, past = torch.unique(row * vocabulary + tokens, return_inverse=True)
    parted = len(pasts) > len(row.unique())
    mostly_unread = len(pasts) <= LEAST_SHARE * len(decoder.ids)
    if parted or mostly_unread:
        decoder.regroup(pasts // vocabulary)
        return past
    return row


def sample(decoder, n, max_new_tokens, temperature, stops):
    """Sample n rollouts from each row of the decoder until all have stopped.

    stops: tensor of token ids. Returns ids (P·n, max_new_tokens), logps of the same shape,
    both without meaning past a rollout's end, and lengths (P·n,).
    """
    device = decoder.ids.device
    rollouts = len(decoder.ids) * n
    all_ids = torch.zeros(rollouts, max_new_tokens, dtype=torch.long, device=device)
    all_logps = torch.zeros(rollouts, max_new_tokens, device=device)
    lengths = torch.zeros(rollouts, dtype=torch.long, device=device)
    running = torch.arange(rollouts, device=device)  # (A,)
    row = running // n  # (A,), the row that each of them reads
    for t in range(max_new_tokens):
        tokens, logps = ampo.sample_tokens(decoder.logits[row], temperature)  # (A,)
        all_ids[running, t] = tokens
        all_logps[running, t] = logps
        lengths[running] = t + 1
        going = ~torch.isin(tokens, stops)
        running = running[going]
        row = row[going]
        tokens = tokens[going]
        if len(running) == 0 or t == max_new_tokens - 1:
            break
        row = share_rows(decoder, row, tokens)
        decoder.step(row, tokens)
    return all_ids, all_logps, lengths


def keeps_every_token(model):
    """Are all layers of the model's cache plain ones, without sliding windows or a state?"""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


@torch.inference_mode()
def generate(model, prompts, n, max_new_tokens, temperature=1.0, eos_token_id=None):
    """Sample n responses to every prompt: ampo.generate, faster.

    prompts: lists of token ids. eos_token_id: an id, a list of ids, or None for no stopping.
    Returns for each prompt n pairs (ids, logps): ids keep their end-of-sequence token where
    they stopped by themselves; logps, in nats, are those of the distribution they were drawn
    from. Raises InputError for a model that keeps no keys and values.
    """
    if len(prompts) == 0:
        return []
    if not keeps_every_token(model):
        return ampo.generate(model, prompts, n, max_new_tokens, temperature, eos_token_id)
    if eos_token_id is None:
        eos_token_id = []
    stops = torch.tensor(eos_token_id, dtype=torch.long, device=model.device).reshape(-1)
    on_cuda = model.device.type == "cuda"
    span = CUDA_SPAN if on_cuda else 1
    decoder = Decoder(model, prompts, n, max_new_tokens, span, graphs=on_cuda)
    ids, logps, lengths = sample(decoder, n, max_new_tokens, temperature, stops)
    pairs = []
    for i, length in enumerate(lengths.tolist()):
        pairs.append((ids[i, :length].tolist(), logps[i, :length].tolist()))
    return [pairs[i * n:(i + 1) * n] for i in range(len(prompts))]


if __name__ == "__main__":
    sys.exit(ampo.main(sys.argv[1:], sampler=generate))
