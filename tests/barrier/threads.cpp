// Threads that wait at csrc/cpu/barrier.h; each then reads what all others wrote before. Returns 1
// if a thread reads a stale value. ThreadSanitizer reports reads that race with the writes.
#include <stdlib.h>

#include <thread>
#include <vector>

#include "cpu/barrier.h"

int main(int, char** arguments) {
    const int threads = atoi(arguments[1]), rounds = atoi(arguments[2]);
    fastrnn::cpu::Barrier barrier;
    barrier.reset(threads);
    std::vector<int> written(threads, -1), wrong(threads, 0);
    std::vector<std::thread> team;
    for (int rank = 0; rank < threads; ++rank)
        team.emplace_back([&, rank] {
            for (int round = 0; round < rounds; ++round) {
                written[rank] = round;
                barrier.wait();
                for (int other = 0; other < threads; ++other)
                    wrong[rank] |= written[other] != round;
                barrier.wait();
            }
        });
    for (std::thread& thread : team) thread.join();
    for (int rank = 0; rank < threads; ++rank)
        if (wrong[rank]) return 1;
    return 0;
}
