"""Reference implementation of the papers' formulas in numpy and float64, independent of the code under test.

Arrays over time have T + 1 entries. Entry 0 is the clean image; entry t is the papers' step t.
"""

import math

import numpy as np

# Schedules


def betas_linear(T, start=1e-4, end=0.02):
    """Ho et al. 2020, sec. 4; scaled by 1000/T as in Nichol & Dhariwal 2021's code."""
    return np.array([(start + (end - start) * i / (T - 1)) * 1000 / T for i in range(T)])


def betas_scaled_linear(T, start=0.00085, end=0.012):
    """Rombach et al. 2022: evenly spaced in sqrt(beta)."""
    return np.array(
        [(math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * i / (T - 1)) ** 2 for i in range(T)]
    )


def betas_cosine(T, s=0.008, bound=0.999):
    """Nichol & Dhariwal 2021, eq. 17."""

    def f(u):
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    return np.array([min(1 - f((i + 1) / T) / f(i / T), bound) for i in range(T)])


def betas_sigmoid(T, start=1e-4, end=0.02):
    """The sigmoid in beta of the DDIM code: x evenly spaced in [-6, 6]."""
    x = [-6 + 12 * i / (T - 1) for i in range(T)]
    return np.array([start + (end - start) / (1 + math.exp(-v)) for v in x])


def betas_jsd(T):
    """Sohl-Dickstein et al. 2015: 1/T, 1/(T - 1), ..., 1."""
    return np.array([1 / (T - i) for i in range(T)])


def alphabar_of(betas):
    """alphabar_0 = 1, alphabar_1, ..., alphabar_T."""
    table = [1.0]
    for beta in betas:
        table.append(table[-1] * (1 - beta))
    return np.array(table)


def alphabar_sigmoid(T, start=-3.0, end=3.0, tau=1.0, minimum=1e-9):
    """Chen 2023, algorithm 1, `sigmoid_schedule`."""

    def sig(x):
        return 1 / (1 + math.exp(-x))

    v_start, v_end = sig(start / tau), sig(end / tau)
    values = [(v_end - sig((i / T * (end - start) + start) / tau)) / (v_end - v_start) for i in range(T + 1)]
    return np.array([1.0] + [max(v, minimum) for v in values[1:]])


def alphabar_zero_terminal(alphabar):
    """Lin et al. 2023, algorithm 1: sqrt(alphabar) shifted to end at 0, scaled to keep its first value."""
    root = np.sqrt(alphabar[1:])
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.concatenate([[1.0], root**2])


# The reverse step between entries s < t of a table


def beta_between(alphabar, t, s):
    return 1 - alphabar[t] / alphabar[s]


def posterior_mean(alphabar, t, s, x0, x_t):
    """Ho et al. 2020, eq. 7, for a step from t to s."""
    beta = beta_between(alphabar, t, s)
    of_x0 = np.sqrt(alphabar[s]) * beta / (1 - alphabar[t])
    of_x_t = np.sqrt(alphabar[t] / alphabar[s]) * (1 - alphabar[s]) / (1 - alphabar[t])
    return of_x0 * x0 + of_x_t * x_t


def posterior_variance(alphabar, t, s):
    """beta-tilde, Ho et al. 2020, eq. 7."""
    return (1 - alphabar[s]) / (1 - alphabar[t]) * beta_between(alphabar, t, s)


def reverse_variance(alphabar, chain, i, kind, v=None):
    """Variance of p(x_s | x_t), t = chain[i], s = chain[i - 1] (or 0 for i = 0).

    beta-tilde of the last step (i = 0) is 0. The code of DDPM and improved DDPM replaces it by that of i = 1, both for
    the fixed variances and for the lower end of the learned range.
    """
    t, s = chain[i], chain[i - 1] if i else 0
    beta = beta_between(alphabar, t, s)
    tilde = posterior_variance(alphabar, t, s) if i else posterior_variance(alphabar, chain[1], chain[0])
    if kind == "small":
        return tilde
    if kind == "large":
        return beta if i else tilde
    if kind == "learned":
        return np.exp(v)  # the code of improved DDPM: the output is the log-variance, at every step
    frac = (v + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
    return np.exp(frac * math.log(beta) + (1 - frac) * math.log(tilde))


# Likelihood, bits per dimension


def normal_kl(mean1, var1, mean2, var2):
    """KL(N1 || N2) in nats."""
    return 0.5 * (np.log(var2) - np.log(var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


def normal_cdf(x):
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in np.ravel(x)]).reshape(np.shape(x))


def decoder_nats(x0, mean, std):
    """-ln p(x0 | x_1): a Gaussian integrated over bins of 2/255, the outer bins open (Ho et al. 2020, eq. 13)."""
    upper = np.where(x0 > 0.999, 1.0, normal_cdf((x0 + 1 / 255 - mean) / std))
    lower = np.where(x0 < -0.999, 0.0, normal_cdf((x0 - 1 / 255 - mean) / std))
    return -np.log(upper - lower)


def bound_bits(alphabar, chain, i, x0, x_t, x0_hat, kind, v=None):
    """L_{t-1} (or L_0 for i = 0) in bits per dimension, shape (B,)."""
    t, s = chain[i], chain[i - 1] if i else 0
    variance = reverse_variance(alphabar, chain, i, kind, v)
    mean = posterior_mean(alphabar, t, s, x0_hat, x_t)
    if i == 0:
        nats = decoder_nats(x0, mean, np.sqrt(variance))
    else:
        true_mean = posterior_mean(alphabar, t, s, x0, x_t)
        nats = normal_kl(true_mean, posterior_variance(alphabar, t, s), mean, variance)
    return nats.reshape(len(nats), -1).mean(axis=1) / math.log(2)


def prior_bits(alphabar, t, x0):
    """L_T = KL(q(x_T | x0) || N(0, I)) in bits per dimension, shape (B,)."""
    # KL = (variance + mean^2 - 1 - ln variance)/2 with variance = 1 - alphabar
    nats = 0.5 * (-alphabar[t] + alphabar[t] * x0**2 - np.log1p(-alphabar[t]))
    return nats.reshape(len(nats), -1).mean(axis=1) / math.log(2)
