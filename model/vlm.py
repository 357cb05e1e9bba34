"""What every vision-language model here is: a tower, a connector, a LLaMA decoder that reads both.

In the token sequence an image is copies of the image token. A family's network (model/llava.py) says what they stand
for, in two steps, because the tower is frozen in the papers: its output does not depend on the policy, so callers run
`vision_features` once per distinct image and hand the result to policy and reference alike. Where the tower trains
they hand on the pixels instead (`seen`), and each scoring runs the tower as it is then: the policy's with gradients,
the reference's with its former weights.

    vision_features(pixels (N, 3, S, S)) -> features (N, P, C), without gradient unless the tower trains; N is 0 for
        questions without an image
    connect(features, rows (I,), questions) -> (I, D), the embedding of each image token
        rows: which of the N * tile_tokens rows that the tiles give; see `View` (model/views.py).
        questions: for each prompt that has image tokens, in the order of `rows`, the token ids that its image tokens
            depend on; () in families where they do not.

`connect` sees all prompts with an image of a batch at once, each distinct (image, prompt) once. So it can do its work
once per tile (LLaVA projects each once, however often it is shown) or once per prompt (a Q-Former that reads the
question).

The configuration has these fields and properties:

    text               LlamaConfig of the decoder; `vocab_size` without rows that no text uses
    surplus_rows       the number of those rows
    image_token_index  id of the image token
    tile_tokens        image tokens of a tile
    model_type         key of model.families.FAMILIES
    template           name of the family's prompt template
    vision.image_size  side of a tile in pixels

Shapes: N tiles, S pixels a side, P patches, C vision width, D decoder width, T tokens, I image tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn

from model.attention import Causal


class VLM(nn.Module):
    """Base of the networks. A subclass makes `language_model` (model/llama.py), `connect` as in the header, and

        run_tower(pixels (N, 3, S, S)) -> features (N, P, C)

    CONNECTOR: name of the module that may train without adapters.
    TOWER: name of the module that sees the image; it trains only when told to.
    """

    CONNECTOR: str
    TOWER: str

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tower_trains = False

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.language_model.lm_head.weight.device

    @property
    def connector(self) -> nn.Module:
        """What leads from features to the decoder."""
        return self.get_submodule(self.CONNECTOR)

    @property
    def tower(self) -> nn.Module:
        """What makes features of pixels."""
        return self.get_submodule(self.TOWER)

    def train_tower(self) -> None:
        """Let the tower train, in fp32."""
        self.tower.float().requires_grad_(True)
        self.tower_trains = True

    def vision_features(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) -> features (N, P, C), with gradients only where the tower trains."""
        with torch.set_grad_enabled(self.tower_trains and torch.is_grad_enabled()):
            return self.run_tower(pixels)

    def seen(self, pixels: Tensor) -> Tensor:
        """What a scorer takes of the images: features (N, P, C), or pixels (N, 3, S, S) where the tower trains."""
        return pixels if self.tower_trains else self.vision_features(pixels)

    def embed(self, ids: Tensor, features: Tensor, rows: Tensor, slots: Tensor | None = None,
              questions: list[tuple[int, ...]] | None = None) -> Tensor:
        """Token embeddings with what `connect` gives in place of image tokens.

        Args:
            ids: (T,) token ids.
            features: (N, P, C) output of `vision_features`.
            rows: (I,) for each image token what it stands for.
            slots: (I,) where in `ids` these image tokens are; left out, they are looked for, which on CUDA waits
                for the device.
            questions: of each prompt in `ids` that has image tokens.
        Returns: (T, D).
        Raises ValueError when the image tokens are not as many as `rows`.
        """
        is_image = ids == self.config.image_token_index  # (T,)
        slots = is_image.nonzero()[:, 0] if slots is None else slots
        if len(slots) != len(rows):
            raise ValueError(f"{len(slots)} image tokens for {len(rows)} image features")
        # The image token may lie outside the embedding table (original LLaVA), so it is never looked up.
        x = self.language_model.model.embed_tokens(ids.masked_fill(is_image, 0))  # (T, D)
        if not len(rows):
            return x  # questions without an image
        return x.index_copy(0, slots, self.connect(features, rows, questions or []).to(x.dtype))

    def logits(self, ids: Tensor, pixels: Tensor, rows: Tensor | None = None,
               question: tuple[int, ...] = ()) -> Tensor:
        """One sequence, plainly: ids (T,), pixels (N, 3, S, S), rows (I,) -> logits (T, V). The yardstick for
        faster paths. Without `rows` all rows of all tiles are shown in order."""
        features = self.vision_features(pixels)  # (N, P, C)
        rows = torch.arange(len(pixels) * self.config.tile_tokens, device=ids.device) if rows is None else rows
        states = self.language_model.model(
            self.embed(ids, features, rows, questions=[question]), torch.arange(len(ids), device=ids.device), Causal()
        )
        return self.language_model.lm_head(states)
