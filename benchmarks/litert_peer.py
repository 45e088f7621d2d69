"""What litert-torch and ai-edge-quantizer make of a network: fp32 and static int8 .tflite files.

    PYTHON benchmarks/litert_peer.py NETWORK IMAGES.npy FOLDER

PYTHON has litert-torch and ai-edge-quantizer, whose pins are others than EdgeKit's: benchmarks/int8.py runs this file
in an environment of its own. NETWORK is as there. Writes litert_fp32.tflite, litert_int8.tflite and litert.json with
the qparams of the latter's input and output.
"""

import json
import sys
from pathlib import Path

import litert_torch
import networks
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe


def main() -> None:
    """Converts and quantizes the network named on the command line."""
    name, images, folder = sys.argv[1], np.load(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    module, _ = networks.load(name, torch.from_numpy(images[:48]))
    fp32, int8 = (folder / f"litert_{precision}.tflite" for precision in ("fp32", "int8"))
    litert_torch.convert(module, (torch.from_numpy(images[:1]),)).export(str(fp32))
    signature, names = next(iter(Interpreter(str(fp32)).get_signature_list().items()))
    maker = quantizer.Quantizer(str(fp32))
    maker.load_quantization_recipe(recipe.static_wi8_ai8())
    samples = [{names["inputs"][0]: image[None]} for image in images]
    maker.quantize(maker.calibrate({signature: samples})).export_model(str(int8))
    file = Interpreter(str(int8))
    ends = (file.get_input_details()[0], file.get_output_details()[0])
    facts = [{"dtype": np.dtype(end["dtype"]).name, "quantization": end["quantization"]} for end in ends]
    found = {"input": names["inputs"][0], "output": names["outputs"][0], "ends": facts}
    (folder / "litert.json").write_text(json.dumps(found))


main()
