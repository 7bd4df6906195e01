"""The libraries behind PyTorch: cuBLAS, cuSOLVER, cuFFT, cuSPARSE, cuRAND, and sorting."""

import torch

from result import Result
from torch_seed import seed


def main():
    seed()
    result = Result()
    a = torch.randn(1024, 1024, device="cuda")
    spd = a @ a.T / 1024 + torch.eye(1024, device="cuda")
    result.output("matmul", a @ a, (a.bfloat16() @ a.bfloat16()).float(), a.double() @ a.double())
    result.output("cholesky, solve", torch.linalg.cholesky(spd), torch.linalg.solve(spd, a[:, :8]))
    result.output("singular values", torch.linalg.svdvals(a[:256, :256]))
    result.output("eigenvalues", torch.linalg.eigvalsh(spd[:256, :256]))
    result.output("fft", torch.fft.fft2(a), torch.fft.irfft(torch.fft.rfft(a)))
    sparse = (a * (a > 2)).to_sparse_csr()
    result.output("sparse", sparse @ a[:, :64])
    result.output("random", torch.rand(1 << 20, device="cuda"), torch.randperm(1 << 16, device="cuda"))
    values, order = a.flatten().sort(stable=True)
    result.output("sort", values, order)
    result.output("scan", a.double().cumsum(0))
    torch.cuda.synchronize()
    result.done()


main()
