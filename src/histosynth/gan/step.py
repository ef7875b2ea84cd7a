"""One training step, read from top to bottom. `train_gan` calls it and keeps the books; it also works alone:

step = TrainingStep(config, classes, Crew.join("cuda"), steps=1000)
step(0, images, labels)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from histosynth.core.seeds import derive
from histosynth.gan.augment import augment
from histosynth.gan.config import GanConfig
from histosynth.gan.crew import Crew
from histosynth.gan.losses import (
    ChannelStatistics,
    PathLength,
    discriminator_loss,
    diversity_penalty,
    drift_penalty,
    feature_matching,
    generator_loss,
    perceptual_loss,
    r1_penalty,
    relativistic_loss,
    saturation_penalty,
    spread_penalty,
)
from histosynth.gan.meter import Meter
from histosynth.gan.players import Players, to_network
from histosynth.gan.steering import Steering


@dataclass
class Part:
    """What one forward pass takes: a slice of the batch, with its own random numbers."""

    draw: torch.Generator
    real: Tensor
    labels: Tensor
    fake: Tensor | None = None


class TrainingStep:
    """Makes steps of the networks, the losses' running numbers and the guards.

    Attributes:
        players, steering, meter: see their modules.
    """

    def __init__(self, config: GanConfig, classes: Sequence[str], crew: Crew, steps: int) -> None:
        """Args: `steps` is the length of the training, with which the cosine schedule ends.

        Raises:
            SettingError, CheckpointError: as `Players`.
        """
        self.config, self.crew, self.steps = config, crew, steps
        self.players, self.steering, self.meter = Players(config, classes, crew), Steering(config), Meter()
        self.statistics = ChannelStatistics(config.channel_stats_decay)
        self.path = PathLength(weight=1.0)
        self.relativistic = config.loss == "relativistic"

    def __call__(self, step: int, images: Tensor, labels: Tensor, progress: float | None = None) -> None:
        """Step number `step` on a whole batch, uint8 [N, 3, S, S] and int64 [N].

        Args:
            progress: 0 to 1, for the learning rates; by default it follows the number of the step.
        """
        config, players = self.config, self.players
        players.set_rates(step / self.steps if progress is None else progress)
        real = to_network(images, self.crew.device)
        labels = labels.to(self.crew.device, non_blocking=True)
        if config.channel_stats:
            self.statistics.update(real)
        # all that is random in this step follows from (seed, step) and the number of the part
        parts = []
        for number, rows in self.crew.share(len(images), config.accumulate):
            draw = torch.Generator(self.crew.device).manual_seed(derive(config.seed, "gan step", step, number))
            parts.append(Part(draw, real[rows], labels[rows]))

        self._learn_to_make(step, parts)
        real_logits = self._learn_to_judge(step, parts)
        players.update_average(step)

        fake = torch.cat([part.fake for part in parts if part.fake is not None])
        if config.saturation_guard:
            fake = self.crew.gather(fake)
        real_logits = self.crew.gather(real_logits)
        self.steering.update(step, real_logits, fake, real)
        self.meter.add(step, acc=(real_logits > 0).float().mean())
        if (step + 1) % config.log_every:
            return
        self.meter.add_images(step, "real", real)
        self.meter.add_images(step, "fake", fake)
        if config.collapse:
            with torch.no_grad():
                seen = [players.discriminator.features(x, players.dtype) for x in (parts[0].fake, parts[0].real)]
            self.steering.watch(parts[0].fake, parts[0].real, *seen, parts[0].labels)

    def _learn_to_make(self, step: int, parts: list[Part]) -> None:
        """The generator's step; leaves its tiles in the parts."""
        config, players, steering = self.config, self.players, self.steering
        generator, features = players.generator, players.discriminator.features
        players.judge_gradients(False)
        players.forget("generator")
        for part in parts:
            fake = generator(**self._codes(part, part.labels), dtype=players.dtype)
            seen = self._augment(fake, part)
            logits, head_logits = self._judge(seen, part.labels)
            rivals, head_rivals = self._rivals(part)
            terms = {"g_adv": (1.0, self._fooling(logits, rivals))}
            if head_logits is not None:
                terms["g_head"] = steering.alpha, self._fooling(head_logits, head_rivals)
            if config.channel_stats:
                terms["g_stats"] = config.channel_stats, self.statistics.penalty(fake)
            if config.perceptual:
                apart = perceptual_loss(players.encoders["perceptual"], fake, part.real, config.paired)
                terms["g_perceptual"] = steering.perceptual, apart
            if config.saturation:
                like = part.real if config.saturation_relative else None
                terms["g_saturation"] = config.saturation, saturation_penalty(fake, config.saturation_above, like)
            if config.feature_matching:
                with torch.no_grad():
                    wanted = features(self._augment(part.real, part), players.dtype)
                apart = feature_matching(features(seen, players.dtype), wanted, config.paired)
                terms["g_features"] = config.feature_matching, apart
            if config.diversity:
                terms["g_diversity"] = config.diversity, diversity_penalty(fake, config.diversity_below)
            if config.spread and players.head is not None:
                with torch.no_grad():
                    true = players.head.see(part.real, players.dtype)
                lack = spread_penalty(players.head.see(fake, players.dtype), true, part.labels)
                terms["g_spread"] = config.spread, lack
            self._backward(step, "g_loss", terms, len(parts))
            part.fake = fake.detach()
        players.descend("generator", clip=config.clip_g)

        if config.path_length and step % config.path_length_every == 0:
            players.forget("generator")
            for part in parts:
                labels = part.labels[: max(1, len(part.labels) // 2)]  # half the tiles: it is dear
                codes = self._codes(part, labels)
                w = generator.mapping(codes["z"], labels)[:, None].repeat(1, generator.layers, 1)
                penalty = self.path.penalty(generator.paint(w, codes["noise"]), w, part.draw)
                (penalty * (config.path_length * config.path_length_every / len(parts))).backward()
                self.meter.add(step, g_path=penalty)
            players.descend("generator", clip=config.clip_g)

    def _learn_to_judge(self, step: int, parts: list[Part]) -> Tensor:
        """The discriminators' step on the same fake tiles (drawing them anew would cost a tenth of it); gives the
        logits of the real ones (relativistic: less those of the fake ones)."""
        config, players = self.config, self.players
        penalise = players.gamma > 0 and step % config.r1_every == 0
        players.judge_gradients(True)
        players.forget("discriminator", "head")
        kept = []
        for part in parts:
            real, fake = self._augment(part.real, part), self._augment(part.fake, part)
            real_logits, real_head, fake_logits, fake_head = self._judge_both(real, fake, part.labels)
            terms = {"d_adv": (1.0, self._telling(real_logits, fake_logits))}
            if real_head is not None and fake_head is not None:
                terms["d_head"] = 1.0, self._telling(real_head, fake_head)
            if config.drift:
                terms["d_drift"] = config.drift, drift_penalty(real_logits)
            if penalise and not config.r1_lazy:
                terms["r1"] = players.gamma / 2, self._gradient_penalty(part)
            self._backward(step, "d_loss", terms, len(parts))
            self.meter.add(step, real_logit=real_logits.mean(), fake_logit=fake_logits.mean())
            kept.append((real_logits - fake_logits if self.relativistic else real_logits).detach())
        players.descend("discriminator", "head", clip=config.clip_d)

        if penalise and config.r1_lazy:
            players.forget("discriminator")
            for part in parts:
                penalty = self._gradient_penalty(part)
                (penalty * (players.gamma / 2 * config.r1_every / len(parts))).backward()
                self.meter.add(step, r1=penalty)
            players.descend("discriminator", clip=config.clip_d)
        return torch.cat(kept)

    def _judge(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [N]; and [N, k] of the head, where it has a loss of its own."""
        logits = self.players.discriminator(images, labels, self.players.dtype)
        seen = self._through_head(images, labels)
        return self._joined(logits, seen)

    def _judge_both(
        self, real: Tensor, fake: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """`_judge` of real and of fake tiles. The head sees them as one batch, which is a fifth faster; the
        discriminator compares the tiles of a batch with one another, so it may not."""
        players = self.players
        seen = self._through_head(torch.cat([real, fake]), torch.cat([labels, labels]))
        halves = (None, None) if seen is None else seen.chunk(2)
        real_logits, fake_logits = (players.discriminator(x, labels, players.dtype) for x in (real, fake))
        return *self._joined(real_logits, halves[0]), *self._joined(fake_logits, halves[1])

    def _rivals(self, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """`_judge` of the real tiles that the fake ones are measured against; none where they are not."""
        if not self.relativistic:
            return None, None
        with torch.no_grad():
            return self._judge(self._augment(part.real, part), part.labels)

    def _fooling(self, fake_logits: Tensor, rivals: Tensor | None) -> Tensor:
        """The generator's adversarial loss."""
        return generator_loss(fake_logits) if rivals is None else relativistic_loss(fake_logits, rivals)

    def _telling(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The discriminators' adversarial loss."""
        config = self.config
        if self.relativistic:
            return relativistic_loss(real_logits, fake_logits)
        smoothed = (config.label_real, config.label_fake) if config.loss == "bce" else (1.0, 0.0)
        return discriminator_loss(real_logits, fake_logits, *smoothed)

    def _through_head(self, images: Tensor, labels: Tensor) -> Tensor | None:
        if self.players.head is None or (self.config.head_joint and not self.steering.alpha):
            return None
        return self.players.head(images, labels, self.players.dtype)

    def _joined(self, logits: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if seen is None or not self.config.head_joint:
            return logits, seen
        return logits + self.steering.alpha * seen.mean(dim=1), None

    def _gradient_penalty(self, part: Part) -> Tensor:
        """R1, relativistic: R1 + R2, with respect to the tiles before their augmentation, as in StyleGAN2-ADA; in
        float32, since a gradient of a gradient loses too much in bfloat16. The head is bounded by its norms."""
        found = []
        assert part.fake is not None
        for images in (part.real, part.fake) if self.relativistic else (part.real,):
            given = images.detach().requires_grad_(True)
            found.append(r1_penalty(self.players.discriminator(self._augment(given, part), part.labels), given))
        return torch.stack(found).sum()

    def _augment(self, images: Tensor | None, part: Part) -> Tensor:
        assert images is not None
        return augment(images, self.steering.p, part.draw, self.config.ada_pipe)

    def _codes(self, part: Part, labels: Tensor) -> dict[str, Any]:
        """The arguments of the generator for fake tiles of these classes."""
        config, count, generator = self.config, len(labels), self.players.generator
        z, z2 = torch.randn(2, count, config.z_dim, generator=part.draw, device=part.draw.device)
        mixed = torch.rand(count, generator=part.draw, device=part.draw.device) < config.style_mixing
        cut = torch.randint(1, generator.layers, (count,), generator=part.draw, device=part.draw.device)
        crossover = torch.where(mixed, cut, generator.layers)
        noise = generator.draw_noise(count, part.draw) if config.noise else None
        return {"z": z, "labels": labels, "noise": noise, "z2": z2, "crossover": crossover}

    def _backward(self, step: int, name: str, terms: dict[str, tuple[float, Tensor]], parts: int) -> None:
        """Gradients of the weighted sum, the mean over `parts`; the log gets the sum and each term unweighted."""
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        (total / parts).backward()
        self.meter.add(step, **{key: value for key, (_, value) in terms.items()}, **{name: total})

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        own = {"steering": self.steering, "meter": self.meter, "path": self.path, "statistics": self.statistics}
        return self.players.state() | {name: part.state() for name, part in own.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.players.restore(state)
        for part, name in (
            (self.steering, "steering"), (self.meter, "meter"), (self.path, "path"), (self.statistics, "statistics"),
        ):  # fmt: skip
            part.restore(state[name])
