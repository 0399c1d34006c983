"""The loss of a vision-language model over a whole evaluation: the mean of all tokens that are learnt."""

import torch
import torch.nn.functional as F

from vitweave.training.vlm_text import IGNORED


@torch.no_grad()
def token_losses(logits, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` of the Trainer: of each sample the summed loss and the number of its tokens.

    Args:
        logits: (batch, tokens, vocabulary), the first of a tuple of outputs.
        labels: (batch, tokens), -100 where the loss does not look.

    Returns:
        (batch, 2).
    """
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.double().sum(dim=1), (targets != IGNORED).double().sum(dim=1)], dim=1)


class TokenLoss:
    """`compute_metrics` of the Trainer, batch by batch: the mean loss of all tokens, which no batch size changes."""

    def __init__(self):
        self.total = torch.zeros(2, dtype=torch.float64)

    def __call__(self, predictions, compute_result: bool = True) -> dict[str, float]:
        self.total += torch.as_tensor(predictions.predictions).cpu().sum(dim=0)
        if not compute_result:
            return {}
        (loss, tokens), self.total = self.total.tolist(), torch.zeros(2, dtype=torch.float64)
        return {"token_loss": loss / max(tokens, 1.0)}
