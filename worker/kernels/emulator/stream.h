// Streams of the emulated device: what is submitted runs at once, or is kept while a graph is captured.
#pragma once
#include <functional>
#include <vector>

typedef int Status;
typedef std::function<void()> Work;
#define EXPORT extern "C" __attribute__((visibility("default")))

struct Stream { bool capturing = false; std::vector<Work> graph; };
Status run(void* stream, Work work);
