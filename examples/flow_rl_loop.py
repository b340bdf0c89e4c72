"""A whole flow-RL loop on torch and g2rpo_kernels alone: python examples/flow_rl_loop.py

An MLP learns to draw from eight spots on a circle; then rewards alone teach it which one to prefer.
"""

import torch
from torch.nn import Linear, Sequential, SiLU

import g2rpo_kernels as gk

torch.manual_seed(0)
STEPS, SDE_STEPS, ANCHORS, BRANCHES = 10, 4, 32, 12
t = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
sigmas = (3 * t / (1 + 2 * t)).tolist()  # from 1, noise, to 0, data
net = Sequential(Linear(3, 64), SiLU(), Linear(64, 64), SiLU(), Linear(64, 2))
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
start = torch.randn(2000, 2)


def velocity(x, sigma):  # [P, 2]; a number or [P, 1] -> [P, 2]
    return net(torch.cat([x, torch.as_tensor(sigma).expand(len(x), 1)], dim=1))


def complete(x, first):  # [P, 2] at sigmas[first] -> [P, 2], by the ODE
    for now, after in zip(sigmas[first:], sigmas[first + 1 :]):
        x = gk.ode_step(velocity(x, now), x, now, after)
    return x


def reward(points):  # [P, 2] -> [P]: how near to the spot on the right
    return -(points - torch.tensor([2.0, 0.0])).norm(dim=1)


@torch.no_grad()
def mean_reward():  # always from the same noise
    return reward(complete(start, 0)).mean()


for _ in range(500):  # pre-training, by flow matching
    angle = torch.randint(8, (256, 1)) * (torch.pi / 4)
    data = 2 * torch.cat([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(256, 2)
    noise, sigma = torch.randn(256, 2), torch.rand(256, 1)
    error = velocity((1 - sigma) * data + sigma * noise, sigma) - (noise - data)
    optimizer.zero_grad()
    error.square().mean().backward()
    optimizer.step()

print(f"reward before {mean_reward():.3f}")
for _ in range(40):  # G2RPO: branches off one ODE run, a position at a time
    x = torch.randn(ANCHORS, 2)
    optimizer.zero_grad()
    for k in range(SDE_STEPS):
        step = gk.step_coefficients(sigmas[k], sigmas[k + 1], eta=0.7)
        v = velocity(x, sigmas[k])
        with torch.no_grad():
            seeds = torch.randint(2**62, (ANCHORS, BRANCHES))
            branches, log_prob = gk.sde_step(v, x, step, seeds=seeds)  # [P, G, 2], [P, G]
            rewards = reward(complete(branches.flatten(0, 1), k + 1)).view(1, 1, -1, 1)
            advantages = gk.group_advantages(rewards, BRANCHES).view(ANCHORS, BRANCHES)
        gk.policy_loss(v, x, branches, log_prob, advantages, step).loss.backward()
        x = gk.ode_step(v.detach(), x, sigmas[k], sigmas[k + 1])
    optimizer.step()
print(f"reward after {mean_reward():.3f}")
