#include "run.h"

#include <omp.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../cells/registry.h"
#include "busy.h"
#include "dispatch.h"
#include "partition.h"
#include "scratch.h"
#include "subnormals.h"

namespace fastrnn::cpu {
namespace {

// Runs one kernel. Returns false, with nothing done, if OpenMP gave fewer threads than the work was
// partitioned between: the barriers would wait for ever for the missing ones.
template <class Task>
bool run_with(const Partition& partition, Task& task, size_t (*workspace_size)(const Task&),
              void (*kernel)(const Task&, int), Run* run = nullptr) {
    Team team{};
    team.partition = partition;
    const int planned = partition.threads();
    team.all.reset(planned);
    const int count = partition.directions * partition.rows;
    Barrier few[2];  // nearly always enough, without an allocation
    std::vector<Barrier> many(count > 2 ? count : 0);
    team.groups = count > 2 ? many.data() : few;
    for (int i = 0; i < count; ++i) team.groups[i].reset(partition.units);
    task.team = &team;
    task.workspace = nullptr;
    const Scratch workspace(workspace_size(task));
    task.workspace = workspace.data();
    if (planned == 1) {
        const SubnormalsAreZeros here;
        kernel(task, 0);
        return true;
    }
    bool enough = true;
#pragma omp parallel num_threads(planned)
    {
        const int rank = omp_get_thread_num();
        if (omp_get_num_threads() == planned) {
            const Run::Work work(*run);
            const SubnormalsAreZeros here;
            kernel(task, rank);
        } else if (rank == 0) {
            enough = false;
        }
    }
    return enough;
}

template <class Task>
void run(Task task, size_t (*workspace_size)(const Task&), void (*kernel)(const Task&, int)) {
    constexpr Pass pass = std::is_same_v<Task, ForwardTask> ? Pass::forward : Pass::backward;
    const int most = quiet_threads(task.threads);
    Partition partition = choose_partition(pass, task, most);
    if (partition.threads() == 1) {
        run_with(partition, task, workspace_size, kernel);
        return;
    }
    const int threads = next_threads(most);
    if (threads < most) partition = choose_partition(pass, task, threads);
    Run here(partition.threads());
    if (!run_with(partition, task, workspace_size, kernel, &here))
        run_with(Partition{}, task, workspace_size, kernel);
}

std::string counted(int64_t n, const char* what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

}  // namespace

void forward(const ForwardLayer& layer) {
    const Kernel& kernels = kernel(layer.cell, layer.storage);
    run(ForwardTask{layer}, kernels.forward_workspace, kernels.forward);
}

void backward(const BackwardLayer& layer) {
    const Kernel& kernels = kernel(layer.cell, layer.storage);
    run(BackwardTask{layer}, kernels.backward_workspace, kernels.backward);
}

// A cell of the user's own has the kernels that were added.
bool has_kernel(int cell, Storage storage) {
    return cell < cell_count || has_own_kernel(cell, storage);
}

// On a thread of its own a model waits for no other thread at any step. Its weights must fit into
// the cache of that thread's core, as where threads partition the rows.
bool runs_models_in_parallel(const Models& models, int threads) {
    return threads > 1 && next_threads(quiet_threads(threads)) > 1 && models.count >= threads &&
           models.count * models.multiply_adds >= worth_a_thread * threads &&
           models.recurrent_weights < values_per_thread;
}

Facts explain(const Layer& layer, Pass pass) {
    const Kernel& kernels = kernel(layer.cell, layer.storage);
    Team team{};
    team.partition = choose_partition(pass, layer, quiet_threads(layer.threads));
    // With all gradients required, but at no address.
    ForwardTask forward{};
    static_cast<Layer&>(forward) = layer, forward.team = &team;
    BackwardTask backward{};
    static_cast<Layer&>(backward) = layer, backward.team = &team;
    const bool is_forward = pass == Pass::forward;
    const TileShape tile =
        is_forward ? kernels.forward_tile(forward) : kernels.backward_tile(backward);
    const size_t bytes =
        is_forward ? kernels.forward_workspace(forward) : kernels.backward_workspace(backward);
    const Partition& partition = team.partition;
    std::string sharing = counted(partition.threads(), "thread");
    if (partition.threads() > 1)
        sharing += ": " + counted(partition.directions, "direction") + " x " +
                   counted(partition.rows, "part") + " of the rows x " +
                   counted(partition.units, "part") + " of the units";
    return {{"path", "cpu"},
            {"instruction set", isa_in_use()},
            {"partition", sharing},
            {"barriers a step", partition.units > 1 ? "1" : "0"},
            {"tile", counted(tile.rows, "row") + " x " + counted(tile.vectors, "vector") + " of " +
                         std::to_string(tile.lanes)},
            {"operands", tile.operands},
            {"scratch", std::to_string(bytes) + " bytes"}};
}

}  // namespace fastrnn::cpu
