// Streams of the emulated device: what is submitted runs at once, or is kept while a graph is captured.
#pragma once
#include <functional>
#include <vector>

typedef int Status;
typedef std::function<void()> Body;
#define EXPORT extern "C" __attribute__((visibility("default")))

// Work that waits for other ranks runs without the device's lock: they need it to come as far.
struct Work { Body body; bool waits_for_others; };
struct Stream { bool capturing = false; std::vector<Work> graph; };
Status run(void* stream, Work work);
