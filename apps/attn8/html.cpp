// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "html.hpp"

#include <fmt/format.h>

namespace attn8::app {
namespace {

// Series colours are the same in every plot: a reader learns them once.
constexpr std::string_view kStyle = R"css(
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0;
  --panel: #f6f8fa; --s0: #0b62c4; --s1: #c2410c; --s2: #15803d; --s3: #7e22ce; --s4: #a16207;
  --s5: #be185d; --s6: #475569; --s7: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e3e7ec; --soft: #9aa4af;
  --line: #39414b; --panel: #1c2026; --s0: #6cb1ff; --s1: #ff9c5f; --s2: #63d38a; --s3: #c99bff;
  --s4: #e3b948; --s5: #ff85b5; --s6: #a9b6c6; --s7: #58cfe4; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--panel);
  padding: .05em .3em; border-radius: .25em; }
nav { columns: 2; margin: 1rem 0; } nav a { display: block; color: var(--s0); }
figure { margin: 1.2rem 0; } figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
svg { width: 100%; height: auto; display: block; font-family: inherit; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 0 1rem; }
@media (max-width: 32rem) { .plots { grid-template-columns: 1fr; } nav { columns: 1; } }
)css";

}  // namespace

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

void HtmlPage::section(std::string_view heading) {
  ++sections_;
  contents_ += fmt::format("<a href=\"#s{}\">{}</a>\n", sections_, escape_html(heading));
  body_ += fmt::format("<h2 id=\"s{}\">{}</h2>\n", sections_, escape_html(heading));
}

void HtmlPage::heading(std::string_view text) {
  body_ += fmt::format("<h3>{}</h3>\n", escape_html(text));
}

void HtmlPage::paragraph(std::string_view text) {
  std::string out;
  bool code = false;
  for (const char c : escape_html(text)) {
    if (c == '`') {
      out += code ? "</code>" : "<code>";
      code = !code;
    } else {
      out += c;
    }
  }
  body_ += fmt::format("<p>{}</p>\n", out);
}

void HtmlPage::figure(std::string_view svg, std::string_view caption) {
  body_ += fmt::format("<figure>\n{}<figcaption>{}</figcaption>\n</figure>\n", svg,
                       escape_html(caption));
}

std::string HtmlPage::str() const {
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>{0}</title>\n<style>{1}</style>\n</head>\n<body>\n<h1>{0}</h1>\n"
      "<nav>\n{2}</nav>\n{3}</body>\n</html>\n",
      escape_html(title_), kStyle, contents_, body_);
}

}  // namespace attn8::app
