// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

int main(int argc, char** argv) { return attn8::app::run_command_line(argc, argv); }
