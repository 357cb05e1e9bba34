"""Model families: which file reads a checkpoint, by the `model_type` of its config.json.

A family is one file. It holds everything that a checkpoint's files decide, and the rest of the code asks it by these
names (model/families/llava.py has them all):

    configuration
      Model                           the network, a model.vlm.VLM that is built from the configuration
      read(folder)                    -> the configuration, with the fields and properties that model/vlm.py lists
      converted_config(config, raw)   -> config.json to save where the source's layout is not the one that is saved
      COMPANIONS                      files that go along with a saved model, besides those of model/layouts.py
    tensors
      tensors(folder)                 -> name in the model: where it is stored
      canonical(name)                 -> name in the model of a tensor of any layout, for adapters
      saved_name(name)                -> name in a saved folder of a tensor of the model
      peft_name(name)                 -> name in the model of `transformers` of a tensor of the model, for adapters
      may_ignore(config, name)        -> whether a file may hold this tensor although the model has no place for it
    prompt
      TEMPLATES, SPECIAL              text around image, question and response; the special tokens in it
      question_reader(folder)         -> question -> token ids that `Model.connect` reads, () where it reads none
      SEVERAL_IMAGES                  whether a prompt may have several images
    images
      find_aspect(folder, config, asked)          -> how images are shown, of the family's ways
      settings_folder(folder)                     -> where the image settings are
      preprocessing(folder, config, aspect)       -> mean, deviation, size, filter
      view(image, aspect, how, config)            -> tiles, and what each image token stands for (model/views.py)
      image_tokens(size, aspect, how, config)     -> their number, without decoding the image

A new family is a new file and a line of FAMILIES.
"""

from pathlib import Path
from types import ModuleType

from common import BadInput
from model.config import Template, read_config
from model.families import instructblip, janus, llava
from model.layouts import config_folder

FAMILIES: dict[str, ModuleType] = {
    "llava": llava, "llava_next": llava,  # llava-hf
    "llava_llama": llava, "llava_mistral": llava,  # the original repository, which also says "llava"
    "janus": janus, "multi_modality": janus,  # deepseek-community; the original repository
    "instructblip": instructblip,
}
TEMPLATES: dict[str, Template] = {
    name: template for family in dict.fromkeys(FAMILIES.values()) for name, template in family.TEMPLATES.items()
}


def find_family(raw: dict, where: str = "config.json") -> ModuleType:
    """The family of a parsed config.json. Raises BadInput on an unknown one."""
    name = raw.get("model_type", "llava")
    if not isinstance(name, str) or name not in FAMILIES:
        raise BadInput(f"{where}: model_type={name!r:.80} is not supported (supported: {', '.join(FAMILIES)})")
    return FAMILIES[name]


def family_of(folder: Path) -> ModuleType:
    """The family of a model's folder, or of the model that adapters go onto. BadInput as from `find_family`."""
    home = config_folder(folder)
    return find_family(read_config(home), str(home / "config.json"))
