"""The probability-flow ODE with adaptive steps."""

import math

from src.errors import UserError

from ..ode import NotFinite, integrate
from .base import Sampler, State, level_near, not_finite


class Dopri5(Sampler):
    """The Dormand-Prince method of order 5 with adaptive steps on the probability-flow ODE (Song et al. 2021).

    With the angle phi = arctan(sigma/alpha) and x/r, r^2 = alpha^2 + sigma^2, the ODE is regular from pure noise to
    clean data on every schedule:

        d(x/r)/d phi = cos(phi) eps - sin(phi) x0

    The solver chooses its steps between two times of the spacing, so a spacing of one step is enough. The last interval
    ends at the schedule's t_min (or the last noisy time, if smaller), where the estimate of x0 is returned. All images
    of a batch share the steps, so images agree only to the tolerance if the batch size changes. `State.evaluations`
    gives the number of evaluations.

    Args:
        tolerance: relative and absolute bound of each step's error per image (root mean square).
        max_evaluations: largest number of denoiser evaluations between two times.

    Raises:
        ValueError: an argument is not positive.
        UserError: when sampling, the tolerance is not reached, or the network's output is not finite.
    """

    def __init__(self, tolerance: float = 1e-5, max_evaluations: int = 10_000):
        for name, value in (("tolerance", tolerance), ("max_evaluations", max_evaluations)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.tolerance, self.max_evaluations = tolerance, max_evaluations

    def step(self, denoiser, x_t, t, s, noise, path):
        schedule = denoiser.schedule
        end = s if s.sigma > 0 else schedule([min(schedule.t_min, path.lowest)]).scalars()[0]
        start, stop = (math.atan2(level.sigma, level.alpha) for level in (t, end))

        first = None  # the prediction at x_t, where the integration begins

        def derivative(turned, y):
            nonlocal first
            phi = start - turned
            level = level_near(schedule, -math.log(math.tan(phi)), path)
            prediction = denoiser(y[0] * math.hypot(level.alpha, level.sigma), level)
            first = first or prediction
            return (prediction.mix(math.sin(phi), -math.cos(phi)),)

        y = (x_t / math.hypot(t.alpha, t.sigma),)
        if stop < start:
            try:
                y, _ = integrate(derivative, y, 0.0, start - stop, self.tolerance, self.max_evaluations)
            except NotFinite as error:
                log_snr = -math.log(math.tan(start - error.x))
                time = schedule.nearest_time([log_snr], path.lowest).item()
                raise not_finite("sampling: the images", f" from t = {time:g} on") from None
            except ValueError as error:
                raise UserError(f"sampler.{error}") from None
        x = y[0] * math.hypot(end.alpha, end.sigma)
        if s.sigma > 0:
            return State(x, first)
        prediction = denoiser(x, end)
        return State(prediction.x0, prediction)
