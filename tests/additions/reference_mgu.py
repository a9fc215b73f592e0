@_cell
def mgu(x: Tensor, r: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of the minimal gated unit (Zhou et al. 2016), the gate after the product.

    f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
    n = tanh(W_in x_t + b_in + f * (W_hn h_{t-1} + b_hn))
    h_t = (1 - f) * h_{t-1} + f * n
    """
    x_f, x_n = x.chunk(2, dim=1)
    r_f, r_n = r.chunk(2, dim=1)
    f = (x_f + r_f).sigmoid()
    return h + f * ((x_n + f * r_n).tanh() - h), None
